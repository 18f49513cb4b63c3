"""Averages of the weights under every engine: the recursion itself, checkpoints, evaluation, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import STEPS, Arena
from transformers import AutoModelForCausalLM
from whole_tensors import whole_tensors

from advice import heard

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero1", "zero2", "zero3", "zero2-offload"]
DECAY = 0.7
EMA: dict[str, Any] = {"ema": {"decay": DECAY}, "data": {"validation": 0.1}, "evaluation": {"every_steps": 4, "per_device": 2},
       "checkpoint": {"every_steps": 1, "keep_last": 99}}  # fmt: skip
PURE = {"precision": "bf16-pure"}
LORA = {"model": {"adapter": {"rank": 4, "targets": ["c_attn"]}}}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("ema"))
    for engine in ENGINES:
        made.ask("train", engine, made.plan(engine, (3, 2, 2), **EMA))
        made.ask("train", f"stopped-{engine}", made.plan(engine, (3, 2, 2), **EMA), stop_after=5)
    made.ask("train", "alone", made.plan("ddp", (6, 1, 2), **EMA))
    made.ask("train", "without", made.plan("ddp", (3, 2, 2), **{**EMA, "ema": None}))
    made.ask("train", "pure", made.plan("fsdp", (3, 2, 2), **EMA, **PURE))
    made.ask("train", "lora", made.plan("ddp", (3, 2, 2), **EMA, **LORA))
    made.go()
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", made.plan(engine, (3, 2, 2), **EMA))
    start = {"run": str(made.folder / f"ddp/checkpoints/step-{STEPS:08d}")}
    still = {
        "duration": {"steps": 1},
        "schedule": {"warmup_steps": 0},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
    }
    made.ask("train", "weights", made.plan("fsdp", (3, 2, 2), **EMA, **still, start_from=start))
    more = {"duration": {"steps": STEPS + 1}, "start_from": {**start, "what": "state"}}
    made.ask("train", "more", made.plan("zero2", (3, 2, 2), **{**EMA, **more}))
    plain = f"{made.folder}/without/checkpoints/step-{STEPS:08d}"
    later = {"duration": {"steps": STEPS + 1}, "start_from": {"run": plain, "what": "state"}}
    made.ask("train", "later", made.plan("ddp", (3, 2, 2), **{**EMA, **later}))
    made.go()
    return made


def tensors(arena: Arena, name: str, step: int, prefix: str) -> dict[str, torch.Tensor]:
    found = whole_tensors(arena.folder / name / f"checkpoints/step-{step:08d}", prefix)
    return {key.removeprefix(prefix): value.float() for key, value in found.items()}


def evaluations(arena: Arena, name: str) -> list[dict[str, Any]]:
    lines = (arena.folder / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]


@pytest.mark.parametrize("name", [*ENGINES, "pure", "lora"])
def test_an_average_follows_its_weight(arena: Arena, name: str) -> None:
    """The recursion over the weights of every saved step, which begins with the first ones."""
    average = tensors(arena, name, 1, "ema.")
    assert average
    assert all(value.dtype == torch.float32 for value in whole_tensors(
        arena.folder / name / "checkpoints/step-00000001", "ema.").values())  # fmt: skip
    for step in range(2, STEPS + 1):
        weights = tensors(arena, name, step, "model.")
        assert average.keys() <= weights.keys()
        average = {k: DECAY * v + (1 - DECAY) * weights[k] for k, v in average.items()}
        found = tensors(arena, name, step, "ema.")
        for key, value in average.items():
            assert torch.allclose(found[key], value, atol=1e-6), (step, key)
    last = tensors(arena, name, STEPS, "model.")
    assert any(not torch.equal(average[key], last[key]) for key in average)
    assert (len(average) == len(last)) is True
    if name == "lora":
        assert all("lora_" in key for key in average)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_training_is_the_same_with_averages_beside_it(arena: Arena, engine: str) -> None:
    """Losses to the bit of a run without; evaluations, in which weights and averages change places, move none."""
    losses = [
        [line["loss"] for line in arena.lines(name)]
        for name in (engine, f"stopped-{engine}", "without")
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)
    ours, again = (tensors(arena, name, STEPS, "ema.") for name in (engine, f"stopped-{engine}"))
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    if engine == "ddp":
        assert losses[0] == losses[2]


@pytest.mark.parametrize("engine", [*ENGINES, "pure"])
def test_evaluations_are_made_with_both(arena: Arena, engine: str) -> None:
    """The averages lag behind; at one split as at another."""
    found = evaluations(arena, engine)
    assert [line["step"] for line in found] == [4, 8]
    reference = evaluations(arena, "alone")
    near = 2e-2 if engine == "pure" else 2e-5
    for mine, theirs in zip(found, reference, strict=True):
        assert mine["eval/loss"] != mine["eval/ema/loss"]
        for key in ("eval/loss", "eval/ema/loss"):
            assert mine[key] == pytest.approx(theirs[key], abs=near)
    plain = evaluations(arena, "without")
    assert [line["eval/loss"] for line in plain] == pytest.approx(
        [line["eval/loss"] for line in reference], abs=2e-5
    )
    assert "eval/ema/loss" not in plain[0]


def test_averages_of_another_run(arena: Arena) -> None:
    """With its weights alone they begin anew; with its state they go on, or begin where it kept none."""
    weights = tensors(arena, "ddp", STEPS, "model.")
    begun = tensors(arena, "weights", 1, "ema.")
    assert all(torch.allclose(begun[key], weights[key], atol=1e-7) for key in weights)
    step = STEPS + 1
    for name, source in (
        ("more", tensors(arena, "ddp", STEPS, "ema.")),
        ("later", tensors(arena, "without", STEPS, "model.")),
    ):
        last = tensors(arena, name, step, "model.")
        found = tensors(arena, name, step, "ema.")
        for key, value in source.items():
            assert torch.allclose(found[key], DECAY * value + (1 - DECAY) * last[key], atol=1e-6), (
                name,
                key,
            )


def test_averages_are_exported_on_request(tmp_path: Path, forked: Any) -> None:
    """`--ema`: transformers loads the averages; a run that kept none says so."""
    words = [
        "duration.steps=4",
        "schedule.warmup_steps=0",
        "evaluation=null",
        "data.validation=0",
        "checkpoint.every_steps=2",
    ]
    done = forked("run", "tiny-code-lm", *words, "ema.decay=0.5", "--run-dir", "kept")
    assert done.returncode == 0, done.stderr
    assert forked("export", "kept", "weights").returncode == 0
    assert forked("export", "kept", "averages", "--ema").returncode == 0
    stored = whole_tensors(tmp_path / "kept/checkpoints/step-00000004", "ema.")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "averages")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"ema.{name}"]), name
    other: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    done = forked("run", "tiny-code-lm", *words, "--run-dir", "bare")
    told = heard(
        "kept no averages. Nearest: without --ema", forked("export", "bare", "x", "--ema").stderr
    )
    assert "--ema" in told
    assert forked("export", "bare", "x").returncode == 0
