"""A pretrained folder with a new head under every engine: one curve, one head, the same bits after a resume."""

import json
from typing import Any

import pytest
from arena import STEPS, Arena
from whole_tensors import whole_tensors

from drumline.plan.model import Plan
from pretrained_folders import saved

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero3"]
SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
REFERENCE = "ddp-6x1x2"
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257, "pad_token_id": 0, "tie_word_embeddings": True}  # fmt: skip
CLASSES = 3


def name_of(engine: str, split: tuple[int, int, int]) -> str:
    return f"{engine}-{'x'.join(map(str, split))}"


def plan_of(arena: Arena, engine: str, split: tuple[int, int, int]) -> Plan:
    """A language model's folder, in three files, as a classifier of texts of 1 to 40 letters."""
    folder = arena.folder / "llama"
    labelled = arena.folder / "labelled.jsonl"
    if not labelled.exists():
        rows = [{"text": "abc"[n % 3] * (1 + n * 7 % 40), "label": n % CLASSES} for n in range(41)]
        labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
        saved(folder, "AutoModelForCausalLM", "llama", LLAMA, shard="40KB")
    return arena.plan(
        engine,
        split,
        model={"source": "folder", "path": str(folder)},
        data={"path": str(labelled), "task": "classification"},
        batch={"weighting": "sample"},
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("finetuning"))
    for engine in ENGINES:
        for split in SPLITS:
            made.ask("train", name_of(engine, split), plan_of(made, engine, split))
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)), stop_after=5)
        made.ask("verify", f"verify-{engine}", plan_of(made, engine, (2, 2, 3)), fault="")
    made.go()
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)))
    made.go()
    return made


def weights(arena: Arena, name: str, step: int = STEPS) -> dict[str, Any]:
    return whole_tensors(arena.folder / name / f"checkpoints/step-{step:08d}", "model.")


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_fine_tuning_is_one_curve(arena: Arena, engine: str, split: tuple[int, int, int]) -> None:
    """Every loss within 1e-5 of one process, so every rank began from the same base and the same new head."""
    name = name_of(engine, split)
    ours, reference = arena.lines(name), arena.lines(REFERENCE)
    assert len(ours) == len(reference) == STEPS
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"]
        assert mine["digest"] == theirs["digest"]
    trained, same = weights(arena, name), weights(arena, REFERENCE)
    assert trained.keys() == same.keys()
    assert "model.score.weight" in trained
    for key, value in same.items():
        assert (trained[key] - value).abs().max() < 1e-4, key


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resume_goes_on_bitwise(arena: Arena, engine: str) -> None:
    """Stopped after step 5: the later losses and the last weights are those of the run that was not."""
    stopped, straight = f"stopped-{engine}", name_of(engine, (3, 2, 2))
    assert [line["loss"] for line in arena.lines(stopped)] == [
        line["loss"] for line in arena.lines(straight)
    ]
    ours, theirs = weights(arena, stopped), weights(arena, straight)
    assert all((ours[key] == theirs[key]).all() for key in theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_is_green(arena: Arena, engine: str) -> None:
    """The split's gradient is that of the undivided batch, on the loaded weights."""
    assert arena.verdict(f"verify-{engine}") == (True, True)
