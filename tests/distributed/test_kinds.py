"""Kinds of fine-tuning keep the promise together: chats, packed documents and adapters under every engine."""

import json
from typing import Any

import pytest
import torch
from arena import PARITY, SPLITS, STEPS, Arena
from whole_tensors import whole_tensors

from drumline.data.builtin import synthetic_chats
from drumline.plan.model import Plan
from pretrained_folders import saved

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "chats": {"data": {}},
    "nf4": {"data": {}, "model": {"adapter": {"rank": 4}, "quantization": "nf4"}},
    "int8": {"data": {}, "model": {"adapter": {"rank": 4}, "quantization": "int8"}, "precision": "bf16"},
    "packed": {"data": {"packing": "documents"}, "model": {"adapter": {"rank": 4}}, "loss": {"chunked": True}},
}  # fmt: skip


TOLERANCE = {"int8": 2e-3}
"""Of losses in bf16."""


def runs_of(kind: str) -> list[tuple[str, tuple[int, int, int]]]:
    if kind == "packed":
        return PARITY
    if kind == "chats":
        return [("ddp", SPLITS[0]), ("fsdp", SPLITS[1]), ("zero3", SPLITS[2])]
    runs = [("ddp", SPLITS[0]), ("ddp", SPLITS[1]), ("fsdp", SPLITS[1])]
    return runs if kind == "int8" else [*runs, ("fsdp", SPLITS[2])]


def name_of(kind: str, engine: str, split: tuple[int, int, int]) -> str:
    return f"{kind}-{engine}-{'x'.join(map(str, split))}"


def plan_of(arena: Arena, kind: str, engine: str, split: tuple[int, int, int]) -> Plan:
    folder, chats = arena.folder / "llama", arena.folder / "chats.jsonl"
    if not chats.exists():
        saved(folder, "AutoModelForCausalLM", "llama", LLAMA)
        chats.write_text("".join(json.dumps(row.fields) + "\n" for row in synthetic_chats(150)))
    changes = KINDS[kind]
    return arena.plan(
        engine,
        split,
        model={"source": "folder", "path": str(folder), **changes.get("model", {})},
        data={"path": str(chats), "task": "sft", "chat_template": "chatml", "sequence_length": 480, **changes["data"]},
        optimizer={"lr": 0.01},
        **{key: value for key, value in changes.items() if key not in ("model", "data")},
    )  # fmt: skip


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("kinds"))
    for kind in KINDS:
        for engine, split in runs_of(kind):
            made.ask("train", name_of(kind, engine, split), plan_of(made, kind, engine, split))
        made.ask("verify", f"verify-{kind}", plan_of(made, kind, "fsdp", (2, 2, 3)), fault="")
        made.ask("train", f"stopped-{kind}", plan_of(made, kind, "fsdp", (3, 2, 2)), stop_after=5)
    made.go()
    for kind in KINDS:
        made.ask("train", f"stopped-{kind}", plan_of(made, kind, "fsdp", (3, 2, 2)))
    made.go()
    return made


CASES = [(kind, *run) for kind in KINDS for run in runs_of(kind)]


@pytest.mark.parametrize(("kind", "engine", "split"), CASES, ids=str)
def test_every_split_is_one_curve(
    arena: Arena, kind: str, engine: str, split: tuple[int, int, int]
) -> None:
    """Every loss within 1e-5 of one process, and it falls."""
    ours = arena.lines(name_of(kind, engine, split))
    reference = arena.lines(name_of(kind, "ddp", SPLITS[0]))
    assert len(ours) == len(reference) == STEPS
    assert ours[-1]["loss"] < ours[0]["loss"]
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < TOLERANCE.get(kind, 1e-5) * theirs["loss"]
        assert mine["digest"] == theirs["digest"]
        assert mine["weight"] == theirs["weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_verify_is_green_and_a_resume_bitwise(arena: Arena, kind: str) -> None:
    """The gradient of the undivided batch and the model's own loss; the bits of the run that was not stopped."""
    assert arena.verdict(f"verify-{kind}") == (True, True)
    assert arena.own_loss(f"verify-{kind}")
    names = [f"stopped-{kind}", name_of(kind, "fsdp", (3, 2, 2))]
    if kind != "packed":
        assert [line["loss"] for line in arena.lines(names[0])] == [
            line["loss"] for line in arena.lines(names[1])
        ]
    stopped, straight = (
        whole_tensors(arena.folder / n / f"checkpoints/step-{STEPS:08d}", "") for n in names
    )
    assert all(torch.equal(stopped[key], straight[key]) for key in straight)


def test_rows_hold_several_documents(arena: Arena) -> None:
    """Fewer rows than chats, and nothing of them is lost."""
    rows = {}
    for kind in ("chats", "packed"):
        plan = plan_of(arena, kind, "ddp", SPLITS[0])
        assert plan.steps.samples
        rows[kind] = plan.steps.samples
    assert rows["packed"] < 0.6 * rows["chats"]
