"""A pretrained folder with a new head under every engine: one curve, one head, the same bits after a resume."""

import json
from typing import Any

import pytest
from arena import PARITY, STEPS, Arena
from whole_tensors import whole_tensors

from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan
from pretrained_folders import saved

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero3"]
RUNS = [run for run in PARITY if run[0] in ENGINES]
REFERENCE = "ddp-6x1x2"
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 257, "pad_token_id": 0, "tie_word_embeddings": True}  # fmt: skip
CLASSES = 3
SETS = {"short": 5, "long": 11}
"""Rows of each evaluation set."""


def name_of(engine: str, split: tuple[int, int, int]) -> str:
    return f"{engine}-{'x'.join(map(str, split))}"


def plan_of(arena: Arena, engine: str, split: tuple[int, int, int]) -> Plan:
    """A language model's folder, in three files, as a classifier of texts of 1 to 40 letters."""
    folder = arena.folder / "llama"
    labelled = arena.folder / "labelled.jsonl"
    if not labelled.exists():
        rows = [{"text": "abc"[n % 3] * (1 + n * 7 % 40), "label": n % CLASSES} for n in range(41)]
        labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, size in SETS.items():
            its = "".join(json.dumps(row) + "\n" for row in rows[-size:])
            (arena.folder / f"{name}.jsonl").write_text(its)
        saved(folder, "AutoModelForCausalLM", "llama", LLAMA, shard="40KB")
    return arena.plan(
        engine,
        split,
        model={"source": "folder", "path": str(folder)},
        data={
            "path": str(labelled),
            "task": "classification",
            "evaluation": {
                name: {"source": "files", "path": str(arena.folder / f"{name}.jsonl")}
                for name in SETS
            },
        },
        batch={"weighting": "sample"},
        evaluation={"every_steps": 4, "per_device": 3},
        early_stopping={"metric": "eval/short/accuracy", "patience": 9},
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("finetuning"))
    for engine, split in RUNS:
        made.ask("train", name_of(engine, split), plan_of(made, engine, split))
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)), stop_after=5)
        made.ask("verify", f"verify-{engine}", plan_of(made, engine, (2, 2, 3)), fault="")
    made.go()
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)))
    made.go()
    return made


def weights(arena: Arena, name: str, step: int = STEPS) -> dict[str, Any]:
    return whole_tensors(arena.folder / name / f"checkpoints/step-{step:08d}", "model.")


@pytest.mark.parametrize(("engine", "split"), RUNS, ids=str)
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
def test_every_set_has_its_own_metrics(arena: Arena, engine: str) -> None:
    """The same under every engine and at two ranks; without a name they are of all rows together."""
    name = name_of(engine, (3, 2, 2))
    ours, theirs = (evaluations(arena, run) for run in (name, REFERENCE))
    assert [line["step"] for line in ours] == [4, 8]
    for mine, same in zip(ours, theirs, strict=True):
        keys = {key for key in same if key.startswith("eval/")}
        assert keys == {
            f"eval/{part}{what}"
            for part in ("", "short/", "long/")
            for what in ("loss", "accuracy")
        }
        for key in keys:
            assert mine[key] == pytest.approx(same[key], rel=1e-5)
        rows = sum(SETS.values())
        whole = sum(size * mine[f"eval/{part}/loss"] for part, size in SETS.items()) / rows
        assert mine["eval/loss"] == pytest.approx(whole, rel=1e-9)
        assert mine["eval/short/loss"] != mine["eval/long/loss"]


def evaluations(arena: Arena, name: str) -> list[dict[str, Any]]:
    lines = read_metrics(arena.folder / name / "metrics.jsonl")
    return [line for line in lines if "eval/loss" in line]


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_is_green(arena: Arena, engine: str) -> None:
    """The split's gradient is that of the undivided batch, on the loaded weights."""
    assert arena.verdict(f"verify-{engine}") == (True, True)
    assert arena.own_loss(f"verify-{engine}")
