"""Adapters and frozen weights under every engine: one curve at any split, small checkpoints, bitwise resumes."""

from typing import Any

import pytest
import torch
from arena import PARITY, SPLITS, STEPS, Arena
from safetensors.torch import load_file
from whole_tensors import whole_tensors

from drumline.checkpoint.shards import read_entries, shard_name
from drumline.plan.model import Plan
from pretrained_folders import changed, saved

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257, "tie_word_embeddings": True}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4, "alpha": 8.0}},
    "dora": {"adapter": {"rank": 3, "dora": True, "targets": ["q_proj", "down_proj"], "train_also": ["*norm*"]}},
    "rslora": {"adapter": {"rank": 4, "rslora": True, "targets": ["self_attn.v_proj"]}},
    "frozen": {"frozen": ["model.embed_tokens.*", "model.layers.0.*"]},
}  # fmt: skip
FEW = [("ddp", (2, 2, 3)), ("fsdp", (3, 2, 2)), ("zero3", (3, 2, 2))]
"""What is tried of kinds other than LoRA."""


def runs_of(kind: str) -> list[tuple[str, tuple[int, int, int]]]:
    if kind == "lora":
        return PARITY
    return [("ddp", SPLITS[0]), *FEW]


def name_of(kind: str, engine: str, split: tuple[int, int, int]) -> str:
    return f"{kind}-{engine}-{'x'.join(map(str, split))}"


def plan_of(arena: Arena, kind: str, engine: str, split: tuple[int, int, int]) -> Plan:
    folder = arena.folder / "llama"
    if not folder.exists():
        saved(folder, "AutoModelForCausalLM", "llama", LLAMA)
    return arena.plan(
        engine,
        split,
        model={"source": "folder", "path": str(folder), **KINDS[kind]},
        optimizer={"lr": 0.02},
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("adapters"))
    stopped = [("lora", engine) for engine in ENGINES] + [("frozen", "zero3"), ("dora", "fsdp")]
    for kind in KINDS:
        for engine, split in runs_of(kind):
            made.ask("train", name_of(kind, engine, split), plan_of(made, kind, engine, split))
    for kind, engine in stopped:
        plan = plan_of(made, kind, engine, (3, 2, 2))
        made.ask("train", f"stopped-{kind}-{engine}", plan, stop_after=5)
        made.ask("verify", f"verify-{kind}-{engine}", plan_of(made, kind, engine, (2, 2, 3)), fault="")  # fmt: skip
    made.go()
    for kind, engine in stopped:  # an adapter goes on at another split
        plan = plan_of(made, kind, engine, (3, 2, 2))
        made.ask("train", f"stopped-{kind}-{engine}", plan)
    made.go()
    return made


def weights(arena: Arena, name: str, prefix: str = "model.") -> dict[str, torch.Tensor]:
    return whole_tensors(arena.folder / name / f"checkpoints/step-{STEPS:08d}", prefix)


CASES = [(kind, *run) for kind in KINDS for run in runs_of(kind)]


@pytest.mark.parametrize(("kind", "engine", "split"), CASES, ids=str)
def test_every_split_is_one_curve(
    arena: Arena, kind: str, engine: str, split: tuple[int, int, int]
) -> None:
    """Losses and the trained weights are those of one process; the frozen ones are those of the files."""
    ours = arena.lines(name_of(kind, engine, split))
    reference = arena.lines(name_of(kind, "ddp", SPLITS[0]))
    assert len(ours) == len(reference) == STEPS
    assert ours[-1]["loss"] < ours[0]["loss"]
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"]
    trained = weights(arena, name_of(kind, engine, split))
    same = weights(arena, name_of(kind, "ddp", SPLITS[0]))
    assert trained.keys() == same.keys()
    for key, value in same.items():
        assert (trained[key] - value).abs().max() < 2e-4, key
    files = load_file(arena.folder / "llama/model.safetensors")
    if kind == "frozen":
        for name, value in files.items():
            is_frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
            assert torch.equal(trained[f"model.{name}"], value) == is_frozen, name
    else:
        assert not [name for name in trained if "base_layer" in name]


@pytest.mark.parametrize(("engine", "split"), runs_of("frozen"), ids=str)
def test_frozen_weights_are_written_once(
    arena: Arena, engine: str, split: tuple[int, int, int]
) -> None:
    """Each engine leaves their content as it is: all checkpoints of a rank share the file that holds them."""
    folder = arena.folder / name_of("frozen", engine, split) / "checkpoints"
    first, last = (folder / f"step-{step:08d}" for step in (2, STEPS))
    names: set[str] = set()
    for rank in range(split[1]):
        entries = read_entries(last, rank)
        files = {entry["file"] for entry in entries.values()} - {shard_name(rank)}
        for file in files:
            assert (first / file).samefile(last / file)
        names |= {name for name, entry in entries.items() if entry["file"] in files}
    assert names
    frozen = ("model.model.embed_tokens.", "model.model.layers.0.")
    everything = {name for rank in range(split[1]) for name in read_entries(last, rank)}
    assert names == {name for name in everything if name.startswith(frozen)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "frozen"])
def test_a_checkpoint_holds_what_is_trained(arena: Arena, kind: str) -> None:
    """Weights and optimizer states of the adapter alone, under names without wrappers."""
    stored = weights(arena, name_of(kind, "ddp", SPLITS[0]), "")
    parts = {"lora_A", "lora_B", *(["lora_magnitude_vector", "norm"] if kind == "dora" else [])}
    names = {name for name in stored if not name.endswith(".step")}
    assert names
    assert all(any(part in name for part in parts) for name in names)
    assert all(any(part in name for name in names) for part in parts)
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resume_goes_on_bitwise(arena: Arena, engine: str) -> None:
    """Stopped after step 5, with the base read from its files again: the same losses and last weights."""
    kinds = ["lora", *(["frozen"] if engine == "zero3" else ["dora"] if engine == "fsdp" else [])]
    for kind in kinds:
        stopped = f"stopped-{kind}-{engine}"
        straight = name_of(kind, engine, (3, 2, 2))
        losses = [[line["loss"] for line in arena.lines(name)] for name in (stopped, straight)]
        assert len(losses[0]) == STEPS
        assert losses[0] == losses[1]
        ours, theirs = weights(arena, stopped), weights(arena, straight)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_is_green(arena: Arena, engine: str) -> None:
    """The gradient of what is trained is that of the undivided batch."""
    assert arena.verdict(f"verify-lora-{engine}") == (True, True)
    assert arena.own_loss(f"verify-lora-{engine}")


def test_another_base_is_refused(arena: Arena) -> None:
    """Files that changed under a run with an adapter are named when it resumes."""
    plan = plan_of(arena, "lora", "ddp", SPLITS[0])
    arena.ask("train", "base-before", plan, stop_after=3)
    arena.go()
    changed(arena.folder / "llama", lambda held: {n: v + 1e-3 for n, v in held.items()})
    arena.ask("train", "base-before", plan)
    with pytest.raises(AssertionError, match="belongs to another training: weights of"):
        arena.go()
