"""Hours of a whole run: steps, evaluations, saves; and a site's measured links and price."""

import json
from dataclasses import replace
from typing import Any

import pytest

from drumline.plan.model import NO_SITE, Plan, SiteFacts, TimeFacts
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.step_time import evaluation_seconds
from drumline.plan.world import World
from drumline.recipe.load import load_recipe

RECIPE = "llama-8b-8xh100"
KNOWN = World(samples=10**8, validation_samples=4096)


def time_of(*overrides: str, world: World = KNOWN) -> TimeFacts:
    return planned(*overrides, world=world)[1]


def planned(*overrides: str, world: World = KNOWN) -> tuple[Plan, TimeFacts]:
    plan = resolve(load_recipe(RECIPE, list(overrides)), world)
    assert plan.time
    return plan, plan.time


def seconds(time: TimeFacts) -> float:
    return 3600 * time.hours.expected


def test_evaluations_are_forwards_of_their_rows() -> None:
    """One every 1,000 steps: its rows on all ranks, each in less than a third of the time of a trained row."""
    plan, time = planned("evaluation.every_steps=1000", "evaluation.per_device=2")
    shape = shape_of(plan.recipe, KNOWN)
    assert not isinstance(shape, str)
    one = evaluation_seconds(plan, shape, 4096)
    assert time.beside["evaluation"] == pytest.approx(20 * one)
    a_row, a_trained_row = one / 4096, time.step_s.expected / 256
    assert 0.15 < a_row / a_trained_row < 0.33
    twice = time_of(
        "evaluation.every_steps=1000",
        "evaluation.per_device=2",
        world=replace(KNOWN, validation_samples=8192),
    )
    assert twice.beside["evaluation"] == pytest.approx(40 * one)
    more = sum(value or 0 for value in time.beside.values())
    assert seconds(time) == pytest.approx(20_000 * time.step_s.expected + more)
    rare = time_of("evaluation.every_steps=30000", "evaluation.per_device=2")
    assert rare.beside["evaluation"] == pytest.approx(one), "after the last step"


def test_an_evaluation_of_unknown_size_is_told() -> None:
    time = time_of("evaluation.every_steps=1000", world=World(samples=10**8))
    assert time.beside["evaluation"] is None
    assert seconds(time) == pytest.approx(
        20_000 * time.step_s.expected + (time.beside["saves"] or 0)
    )


def test_saves_wait_for_copies_and_for_writes_if_not_async() -> None:
    """89.7 GiB over eight ranks, copied at the site's rate; written by a node at the assumed 2 GB/s."""
    known = replace(KNOWN, site=SiteFacts(copy=50.0))
    plan, time = planned("checkpoint.every_steps=1000", world=known)
    part = (plan.cost.checkpoint_bytes or 0) / 8
    assert time.beside["saves"] == pytest.approx(20 * part / 50e9)
    waited = time_of("checkpoint.every_steps=1000", "checkpoint.async=false", world=known)
    assert waited.beside["saves"] == pytest.approx(20 * (part / 50e9 + part * 8 / 2e9))


def test_frozen_weights_are_not_waited_for_again() -> None:
    """All but the last of 32 layers frozen: saves and copies are of what is trained, and the plan says so."""
    every = "checkpoint.every_steps=1000"
    whole, slow = planned(every)
    frozen = [f"model.layers.{n}.*" for n in range(31)]
    plan, time = planned(every, f"model.frozen={json.dumps(frozen)}")
    assert plan.cost.checkpoint_bytes
    assert plan.cost.parameters and plan.cost.trained
    assert plan.cost.frozen_bytes == 4 * (plan.cost.parameters - plan.cost.trained)
    written = plan.cost.checkpoint_bytes - plan.cost.frozen_bytes
    assert written == pytest.approx(12 * plan.cost.trained, rel=1e-3)
    assert plan.memory.host_bytes and whole.memory.host_bytes
    assert plan.memory.host_bytes == pytest.approx(written / 8, rel=1e-3)
    saves, before = time.beside["saves"], slow.beside["saves"]
    assert saves and before
    assert saves / before == pytest.approx(written / (whole.cost.checkpoint_bytes or 0))


def test_by_minutes_as_many_as_fit() -> None:
    """A save every half an hour of the steps' time, and one after the last step."""
    plan, time = planned("checkpoint.every_steps=null", "checkpoint.every_minutes=30")
    one = (plan.cost.checkpoint_bytes or 0) / 8 / 20e9
    assert time.beside["saves"] == pytest.approx(
        one * (1 + 20_000 * time.step_s.expected / 1800), rel=1e-6
    )


@pytest.mark.parametrize("link", ["within", "between"])
def test_the_sites_links_are_used(link: str) -> None:
    """A network of a tenth of the speed is waited for; one much faster changes nothing; the basis says it."""
    where = [] if link == "within" else ["batch.gpus=64", "batch.accumulation=2"]

    def at(rate: float) -> TimeFacts:
        measured: dict[str, Any] = {link: rate}
        return time_of(*where, world=replace(KNOWN, site=SiteFacts(**measured)))

    slow, fast = at(4.0), at(400.0)
    assert slow.parts["communication"] > 3 * fast.parts.get("communication", 0.0)
    assert slow.step_s.expected > 1.3 * fast.step_s.expected
    assert "measured links" in slow.basis
    assert "measured links" not in time_of(*where).basis
    other: dict[str, Any] = {"between" if link == "within" else "within": 1e6}
    with_both = time_of(*where, world=replace(KNOWN, site=SiteFacts(**{link: 4.0}, **other)))
    assert with_both.step_s.expected == pytest.approx(slow.step_s.expected)


def test_the_price() -> None:
    time = time_of(world=replace(KNOWN, site=SiteFacts(gpu_hour_price=2.5)))
    assert time.cost == pytest.approx(2.5 * time.gpu_hours)
    assert time_of(world=replace(KNOWN, site=NO_SITE)).cost is None
