"""Invariants of every schedule in the dict; a new one is tested by being there."""

import math
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.errors import PlanError, RecipeError
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.schedule import (
    SCHEDULES,
    Curve,
    rate,
    rate_at,
    rate_facts,
    resolve_milestones,
    resolve_warmup,
)
from drumline.plan.steps import Clock
from drumline.recipe.load import merge, validate
from drumline.recipe.schedule_section import Schedule
from drumline.session.show import plan_table

DO_NOT_DECAY = {"constant", "inverse_sqrt", "piecewise"}
"""Constant has no end value; inverse sqrt never reaches it; piecewise ends at its last milestone."""


def curve(name: str, total: int = 100, warmup: int = 10, **changes: object) -> Curve:
    values: dict[str, object] = {
        "name": name, "base_lr": 2.0, "peak_lr": 2.0, "min_lr_ratio": 0.1, "total": total,
        "warmup_steps": warmup, "unit": "step", "cycles": 3, "power": 2.0, "decay_steps": 20,
        "start_ratio": 0.04, "milestones": [(50, 0.5), (80, 0.0)],
    }  # fmt: skip
    return Curve(**{**values, **changes})  # type: ignore[arg-type]


def test_the_schema_and_the_dict_name_the_same_schedules() -> None:
    """A schedule that can be written can be run, and the other way round."""
    assert set(SCHEDULES) == set(Schedule.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("total", "warmup"), [(100, 10), (100, 0), (7, 7), (1, 0), (1, 1), (20, 19)]
)
def test_rates_stay_between_zero_and_peak_and_end_at_the_minimum(
    name: str, total: int, warmup: int
) -> None:
    """Every shape: 0 ≤ rate ≤ peak, the peak at the end of warm-up, the minimum at the last step."""
    c = curve(name, total, warmup, decay_steps=max(1, total // 5))
    rates = [rate_at(c, step) for step in range(1, total + 1)]
    assert all(0 < r <= c.peak_lr * (1 + 1e-12) for r in rates)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(c.peak_lr)
        assert rates[:warmup] == sorted(rates[:warmup])
    if warmup < total and name not in DO_NOT_DECAY:
        assert rates[-1] == pytest.approx(c.peak_lr * c.min_lr_ratio)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "one_cycle"])
def test_warm_up_is_a_line_from_zero(name: str) -> None:
    """Rate at step t of warm-up is peak·t/warmup."""
    c = curve(name)
    assert [rate_at(c, t) for t in range(1, 11)] == pytest.approx([0.2 * t for t in range(1, 11)])


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "cosine_restarts"])
def test_after_warm_up_the_rate_never_rises(name: str) -> None:
    """Only restarts go up again."""
    c = curve(name)
    after = [rate_at(c, t) for t in range(10, 101)]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 60, 2.0),
        ("linear", 55, 1.1),
        ("cosine", 55, 1.1),
        ("cosine", 32, 2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2)),
        ("cosine_restarts", 25, 1.1),
        ("cosine_restarts", 40, 2.0),
        ("polynomial", 55, 2 * (0.1 + 0.9 * 0.25)),
        ("inverse_sqrt", 40, 2 * (0.1 + 0.9 * 0.5)),
        ("wsd", 80, 2.0),
        ("wsd", 90, 1.1),
        ("one_cycle", 5, 2 * (0.04 + 0.96 * 0.5)),
        ("piecewise", 49, 2.0),
        ("piecewise", 50, 2 * (0.1 + 0.9 * 0.5)),
        ("piecewise", 80, 0.2),
    ],
)
def test_values_by_hand(name: str, step: int, expected: float) -> None:
    """Each shape at a step worked out by hand: peak 2, minimum 0.2, 100 steps, 10 of warm-up."""
    assert rate_at(curve(name), step) == pytest.approx(expected)


def test_unit_epoch_holds_the_rate_within_an_epoch() -> None:
    """Ten epochs of ten steps: ten rates, the last at the minimum."""
    clock = Clock(100, 10, "keep")
    c = curve("linear", 100, 0, unit="epoch")
    rates = [rate(c, step, clock) for step in range(1, 101)]
    assert len(set(rates)) == 10
    for epoch in range(10):
        assert len(set(rates[10 * epoch : 10 * epoch + 10])) == 1
    assert rates[-1] == pytest.approx(0.2)


def test_warm_up_is_resolved_or_refused() -> None:
    """Ratios become steps; a warm-up longer than the run is an error, never a clamp."""
    assert resolve_warmup(None, 0.05, "cosine", 2000) == 100
    assert resolve_warmup(None, None, "cosine", 2000) == 0
    assert resolve_warmup(None, None, "one_cycle", 100) == 30
    assert resolve_warmup(2000, None, "cosine", 2000) == 2000
    with pytest.raises(
        PlanError, match=r"warmup_steps: 5000 > 2000 steps .* Nearest: warmup_steps 200,"
    ):
        resolve_warmup(5000, None, "cosine", 2000)


def test_milestones_are_steps_or_fractions() -> None:
    """Fractions count from the run's length; a milestone after the end is refused."""
    assert resolve_milestones({"0.5": 0.1, "0.75": 0.01}, 200) == [(100, 0.1), (150, 0.01)]
    assert resolve_milestones({"30": 0.1}, 200) == [(30, 0.1)]
    with pytest.raises(PlanError, match="step 300 > 200 steps"):
        resolve_milestones({"300": 0.1}, 200)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize(("samples", "warmup"), [(60, 13), (60, 0), (7, 25), (100, 100), (33, 12)])
def test_the_rates_that_plan_shows_are_those_of_the_run(
    name: str, unit: str, samples: int, warmup: int
) -> None:
    """First, highest with its step, last: as found by asking for every one of 100 steps."""
    clock = Clock(samples, 10, "keep")
    c = curve(name, 100, warmup, unit=unit)
    rates = [rate(c, step, clock) for step in range(1, 101)]
    facts = rate_facts(c, clock)
    assert (facts.first, facts.last) == (rates[0], rates[-1])
    assert facts.highest == pytest.approx(max(rates), rel=1e-12)
    assert rates[facts.highest_step - 1] == pytest.approx(max(rates), rel=1e-12)


def test_a_promise_that_the_run_would_not_keep_is_refused_or_told() -> None:
    """A warm-up that no step sees, cycles without room, milestones at no step of their own; the fix works."""

    def planned(steps: int, **changes: Any) -> Plan:
        return resolve(validate(tiny_recipe(duration={"steps": steps}, schedule=changes,
                                            data={"samples": 72}), "recipe"))  # fmt: skip

    with pytest.raises(PlanError, match=r"a warm-up of 3 would not be seen .* warmup_steps 12"):
        planned(60, name="linear", unit="epoch", warmup_steps=3)
    assert "at step 1, peak" in plan_table(
        planned(60, name="linear", unit="epoch", warmup_steps=12)
    )
    told = planned(10, name="cosine", warmup_ratio=0.05)
    assert "0.05 × 10 steps = 0.5 rounds to 0, so there is no warm-up" in told.warnings[-1]
    with pytest.raises(
        PlanError, match=r"20 in 10 steps is less than two steps each. Nearest: cycles 5"
    ):
        planned(10, name="cosine_restarts", cycles=20)
    assert planned(10, name="cosine_restarts", cycles=5)
    with pytest.raises(RecipeError, match=r"'1.0': a fraction of the run is below 1"):
        planned(10, name="piecewise", milestones={"1.0": 0.1})
    for places in ({"0.01": 0.5}, {"0.5": 0.5, "0.52": 0.1}):
        with pytest.raises(PlanError, match="before the first step|as the one before"):
            planned(10, name="piecewise", milestones=places)
    flat = planned(6, name="cosine", unit="epoch", min_lr_ratio=0.1)
    assert "the rate never comes near the peak 0.001: it is 0.0001 at most" in flat.warnings


def curve_of(**changes: Any) -> Curve:
    """The curve of a recipe with these sections."""
    return plan_of(**changes).schedule


def plan_of(**changes: Any) -> Plan:
    """The plan of 40 steps with these sections."""
    base = tiny_recipe(duration={"steps": 40}, optimizer={"lr": 1.0})
    return resolve(validate(merge(base, changes), "r"))


def test_a_run_that_ends_before_its_schedule_has_its_first_rates() -> None:
    """`horizon_steps`: the rates of a longer run, cut off; a warm-up beyond the run is then no error."""
    words = {"name": "cosine", "warmup_steps": 5, "min_lr_ratio": 0.1}
    whole = curve_of(schedule=words, duration={"steps": 400})
    cut = curve_of(schedule={**words, "horizon_steps": 400})
    assert [rate_at(cut, step) for step in range(1, 41)] == [
        rate_at(whole, step) for step in range(1, 41)
    ]
    assert cut.last == 40
    longer = curve_of(schedule={**words, "horizon_steps": 20})
    short = curve_of(schedule=words, duration={"steps": 20})
    assert [rate_at(longer, step) for step in range(1, 21)] == [
        rate_at(short, step) for step in range(1, 21)
    ]
    assert {rate_at(longer, step) for step in range(20, 41)} == {rate_at(short, 20)}
    assert cut.total == 400
    early = plan_of(schedule={**words, "warmup_steps": 100, "horizon_steps": 400})
    assert rate_at(early.schedule, 40) == pytest.approx(0.4)
    assert not [line for line in early.warnings if "peak" in line]


def test_a_warm_up_begins_where_it_is_said_to() -> None:
    """A line from warmup_start_ratio before the first step to the peak at the last of the warm-up."""
    curve = curve_of(schedule={"warmup_steps": 4, "warmup_start_ratio": 0.2})
    assert [rate_at(curve, step) for step in (1, 2, 4, 5)] == pytest.approx([0.4, 0.6, 1.0, 1.0])


def test_a_minimum_is_a_rate_or_a_share_of_the_peak() -> None:
    """`min_lr` is the rate of the last step, whatever the batch scales the peak to."""
    scaled = {"lr": 1.0, "lr_scaling": {"rule": "linear", "reference_batch": 6}}
    for optimizer in ({"lr": 1.0}, scaled):
        curve = curve_of(schedule={"name": "linear", "min_lr": 0.05}, optimizer=optimizer)
        assert rate_at(curve, 40) == pytest.approx(0.05)


def test_a_warm_up_of_epochs_is_so_many_steps() -> None:
    """Half an epoch of 100 samples in steps of 12 is 5 steps."""
    data = {"samples": 100}
    plan = plan_of(data=data, schedule={"warmup_epochs": 0.5}, batch={"effective": 12, "per_device": 12, "gpus": 1})  # fmt: skip
    assert plan.steps.per_epoch == 9
    assert plan.schedule.warmup_steps == 5
