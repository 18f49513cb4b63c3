"""`start_from` and `batch.ramp` under every engine: the curve of a run that never stopped, at any split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from arena import PARITY, SPLITS, STEPS, Arena
from whole_tensors import whole_tensors

from drumline.plan.model import Plan
from drumline.train.batches import StepReader, open_rows

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
HALF = STEPS // 2
STEADY = {"schedule": {"name": "constant", "warmup_steps": 0}}
RAMP = {"batch": {"ramp": [{"until_step": 2, "effective": 4}, {"until_step": 5, "effective": 6}]}}
MORE_PAIRS = 17


def checkpoint(arena: Arena, name: str, step: int) -> Path:
    return arena.folder / name / f"checkpoints/step-{step:08d}"


def from_half(
    arena: Arena, engine: str, split: tuple[int, int, int], what: str, **changes: Any
) -> Plan:
    """Begins from the fourth step of `parent-ENGINE`, whose own run ended there."""
    start = {"run": str(checkpoint(arena, f"parent-{engine}", HALF)), "what": what}
    return arena.plan(engine, split, start_from=start, **{**STEADY, **changes})


def other_data(arena: Arena) -> dict[str, Any]:
    """The first rows of the same file, as a file of their own."""
    path = arena.folder / "other.jsonl"
    path.write_text("".join(arena.data.read_text().splitlines(keepends=True)[:MORE_PAIRS]))
    return {"path": str(path)}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("starts"))
    for engine in ENGINES:
        made.ask("train", f"whole-{engine}", made.plan(engine, (3, 2, 2), **STEADY))
        half = made.plan(engine, (3, 2, 2), **STEADY, duration={"steps": HALF})
        made.ask("train", f"parent-{engine}", half)
        made.ask(
            "train", f"stopped-ramp-{engine}", made.plan(engine, (3, 2, 2), **RAMP), stop_after=3
        )
    for engine, split in PARITY:
        made.ask("train", f"ramp-{engine}-{split}", made.plan(engine, split, **RAMP))
    made.go()
    for engine, split in PARITY:
        made.ask("train", f"state-{engine}-{split}", from_half(made, engine, split, "state"))
    for engine in ENGINES:
        stopped = from_half(made, engine, (3, 2, 2), "state")
        made.ask("train", f"stopped-{engine}", stopped, stop_after=6)
        still = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
        made.ask(
            "train", f"weights-{engine}", from_half(made, engine, (2, 2, 3), "weights", **still)
        )
        made.ask("train", f"stopped-ramp-{engine}", made.plan(engine, (2, 2, 3), **RAMP))
    for split in SPLITS:
        plan = from_half(made, "ddp", split, "state", data=other_data(made), optimizer={"lr": 1e-3})
        made.ask("train", f"other-{split}", plan)
    frozen = from_half(
        made,
        "fsdp",
        (3, 2, 2),
        "state",
        model={"frozen": ["transformer.wte.*", "transformer.h.0.*"]},
    )
    made.ask("train", "frozen", frozen)
    made.go()
    for engine in ENGINES:
        for name in ("manifest.json", "state.json"):  # what began from it needs it no more
            checkpoint(made, f"parent-{engine}", HALF).joinpath(name).unlink()
        plan = plan_in(made, f"stopped-{engine}")
        made.ask("train", f"stopped-{engine}", plan)
    made.go()
    return made


def plan_in(arena: Arena, name: str) -> Plan:
    from drumline.plan.model import read_plan

    return read_plan((arena.folder / name / "plan.json").read_text())


def values(arena: Arena, name: str, key: str) -> list[Any]:
    return [line[key] for line in arena.lines(name)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_state_goes_on_as_if_nothing_had_happened(arena: Arena, engine: str) -> None:
    """Steps, samples and losses of the second half of one longer run, bitwise at the same split."""
    for key in ("step", "digest", "samples", "loss", "grad_norm"):
        assert (
            values(arena, f"state-{engine}-(3, 2, 2)", key)
            == values(arena, f"whole-{engine}", key)[HALF:]
        )
    for split in (split for name, split in PARITY if name == engine):
        for key in ("step", "digest", "samples", "weight"):
            assert (
                values(arena, f"state-{engine}-{split}", key)
                == values(arena, f"whole-{engine}", key)[HALF:]
            )
        assert values(arena, f"state-{engine}-{split}", "loss") == pytest.approx(
            values(arena, "whole-ddp", "loss")[HALF:], abs=1e-5
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_it_resumes_bitwise_without_its_parent(arena: Arena, engine: str) -> None:
    """Stopped after two of its steps; the parent's checkpoint is gone when it goes on."""
    for key in ("step", "digest", "loss"):
        assert values(arena, f"stopped-{engine}", key) == values(
            arena, f"state-{engine}-(3, 2, 2)", key
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_alone_begin_a_training(arena: Arena, engine: str) -> None:
    """Step 1, the first sample, and the parent's weights bit for bit: a rate of nothing keeps them."""
    assert values(arena, f"weights-{engine}", "step") == list(range(1, STEPS + 1))
    assert values(arena, f"weights-{engine}", "digest") == values(
        arena, f"whole-{engine}", "digest"
    )
    ours = whole_tensors(checkpoint(arena, f"weights-{engine}", STEPS), "model.")
    whole = whole_tensors(checkpoint(arena, f"whole-{engine}", HALF), "model.")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_other_data_begin_anew_and_the_steps_are_counted_on(arena: Arena) -> None:
    """One curve at three splits, over the 17 new rows from their first on."""
    first = arena.lines(f"other-{SPLITS[0]}")
    assert [line["step"] for line in first] == list(range(HALF + 1, STEPS + 1))
    assert [line["epoch"] for line in first] == [1, 1, 2, 2]
    assert first[0]["samples"] == values(arena, "whole-ddp", "samples")[HALF - 1] + 12
    assert first[0]["digest"] != values(arena, "whole-ddp", "digest")[HALF]
    for split in SPLITS[1:]:
        assert values(arena, f"other-{split}", "digest") == [line["digest"] for line in first]
        losses = [line["loss"] for line in first]
        assert values(arena, f"other-{split}", "loss") == pytest.approx(losses, abs=1e-5)


def test_frozen_weights_stay_those_of_the_parent(arena: Arena) -> None:
    """What is frozen now keeps its value; its optimizer state is left behind."""
    ours = whole_tensors(checkpoint(arena, "frozen", STEPS), "model.")
    whole = whole_tensors(checkpoint(arena, "whole-fsdp", HALF), "model.")
    kept = {name for name in ours if torch.equal(ours[name], whole[name])}
    assert {"model.transformer.wte.weight", "model.transformer.h.0.ln_1.weight"} <= kept
    assert "model.transformer.h.1.ln_1.weight" not in kept
    states = whole_tensors(checkpoint(arena, "frozen", STEPS), "optimizer.")
    assert not any("h.0." in name for name in states)


@pytest.mark.parametrize(("engine", "split"), PARITY, ids=str)
def test_a_ramp_is_one_curve_at_every_split(
    arena: Arena, engine: str, split: tuple[int, int, int]
) -> None:
    """Stages of 4, 6 and 12 samples take the samples in order and without a gap."""
    name, reference = f"ramp-{engine}-{split}", "ramp-ddp-(6, 1, 2)"
    samples = values(arena, name, "samples")
    assert samples == [4, 8, 14, 20, 26, 38, 41, 53]  # 41 rows: the seventh step ends the epoch
    for key in ("digest", "weight", "epoch"):
        assert values(arena, name, key) == values(arena, reference, key)
    assert values(arena, name, "loss") == pytest.approx(values(arena, reference, "loss"), abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ramp_resumes_within_a_stage_at_another_split(arena: Arena, engine: str) -> None:
    """Stopped after the third step, which is in the second stage."""
    for key in ("step", "digest", "samples"):
        assert values(arena, f"stopped-ramp-{engine}", key) == values(
            arena, f"ramp-{engine}-(3, 2, 2)", key
        )
    losses = values(arena, f"ramp-{engine}-(3, 2, 2)", "loss")
    assert values(arena, f"stopped-ramp-{engine}", "loss") == pytest.approx(losses, abs=1e-5)


def test_each_stage_is_shared_out_evenly(arena: Arena) -> None:
    """A stage of four rows on two ranks of three each: two rows on both, in one micro-batch."""
    plan = arena.plan("ddp", (3, 2, 2), **RAMP)
    assert [(s.per_device, s.accumulation) for s in plan.batch.ramp] == [(2, 1), (3, 1)]
    for rank in range(2):
        reader = StepReader(plan, open_rows(plan, "train"), rank)
        for step, sizes in ((1, [2]), (3, [3]), (6, [3, 3])):
            assert [len(part.indices) for part in reader.read(step).micro_batches] == sizes
