"""Advice is re-planned, keeps the batch, is put in order by cost; the sweep holds every split once."""

import json
from typing import Any

import pytest

from drumline.errors import DoesNotFit
from drumline.plan.advise import change_words, with_advice, with_change
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.sweep import sweep
from drumline.plan.world import World
from drumline.recipe.load import load_recipe
from drumline.session.planning import fixed


def advised(name: str, *overrides: str) -> Plan:
    return with_advice(resolve(load_recipe(name, list(overrides))), World())


def as_overrides(change: dict[str, Any]) -> list[str]:
    assert all(isinstance(values, dict) for values in change.values())
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in change.items()
        for key, value in values.items()
    ]


MISFITS = [
    ("llama-1b-8xh100", ["batch.per_device=16", "batch.accumulation=4"]),
    (
        "llama-8b-8xh100",
        ["model.activation_checkpointing=none", "batch.per_device=8", "batch.accumulation=4"],
    ),
    ("llama-8b-8xh100", ["strategy.name=ddp"]),
    ("llama-8b-zero3", ["strategy.name=zero1", "precision=fp32"]),
    ("llama-8b-zero3", ["strategy.name=zero1", "cluster.gpu=a100-40gb"]),
    ("llama-8b-8xh100", ["cluster.gpu=l4", "batch.per_device=4", "batch.accumulation=8"]),
]


@pytest.mark.parametrize(("name", "overrides"), MISFITS)
def test_what_is_advised_is_what_a_plan_then_says(name: str, overrides: list[str]) -> None:
    """Pasted after the recipe, every change gives its number, the same batch, and the same training."""
    plan = advised(name, *overrides)
    assert plan.memory.fits is False
    assert plan.advice
    for advice in plan.advice:
        again = resolve(load_recipe(name, [*overrides, *as_overrides(advice.change)]))
        assert again.memory.device
        assert again.memory.device.high == advice.device_high
        assert again.batch.effective == plan.batch.effective
        is_same = again.training_sha256 == plan.training_sha256
        assert is_same is not advice.changes_training


@pytest.mark.parametrize(("name", "overrides"), MISFITS[:4])
def test_something_fits_and_the_cheapest_comes_first(name: str, overrides: list[str]) -> None:
    """Where a way out exists, only such ways are shown, in order of their cost."""
    plan = advised(name, *overrides)
    capacity = plan.memory.capacity
    assert capacity
    assert all(item.device_high <= capacity for item in plan.advice)
    costs = [item.cost for item in plan.advice]
    assert costs == sorted(costs)


def test_two_changes_are_joined_where_one_is_not_enough() -> None:
    """8B under DDP without checkpointing fits by no single change; what is shown changes two sections."""
    plan = advised("llama-8b-8xh100", "strategy.name=ddp", "model.activation_checkpointing=none",
                   "batch.per_device=8", "batch.accumulation=4")  # fmt: skip
    assert plan.memory.fits is False
    assert plan.memory.capacity
    assert plan.advice
    for advice in plan.advice:
        assert len(advice.change) > 1
        assert advice.device_high <= plan.memory.capacity


def test_room_that_is_left_is_put_to_use() -> None:
    """More than a third unused: what is advised fits, is cheaper, and keeps the batch."""
    plan = advised("llama-8b-8xh100")
    assert plan.memory.device
    assert plan.memory.capacity
    assert plan.memory.device.high < plan.memory.capacity * 2 / 3
    assert plan.advice
    for advice in plan.advice:
        again = resolve(with_change(plan.recipe, advice.change))
        assert again.memory.fits
        assert again.batch.effective == plan.batch.effective
        assert advice.cost < 1


def test_a_plan_that_fits_well_is_left_alone() -> None:
    """Neither too large nor too empty: no advice."""
    plan = advised("llama-1b-8xh100")
    assert plan.memory.device
    assert plan.memory.capacity
    assert plan.memory.capacity * 2 / 3 < plan.memory.device.high <= plan.memory.capacity
    assert plan.advice == []


def test_checkpointing_costs_about_a_third_more() -> None:
    """The cost of a change is its estimated GPU time over the plan's own."""
    plan = advised("gpt2-124m-h200", "batch.per_device=120", "batch.accumulation=4")
    found = {change_words(item.change): item.cost for item in plan.advice}
    assert 1.2 < found["model.activation_checkpointing=full"] < 1.34
    assert 1.0 < found["model.activation_checkpointing=selective"] < 1.2


def test_what_changes_the_training_is_advised_last_and_says_so() -> None:
    """Rows too long for the card whatever is recomputed or offloaded: shorter ones, named as a change."""
    plan = advised("llama-1b-8xh100", "cluster.gpu=rtx-4090", "batch.gpus=1", "cluster.gpus_per_node=1",
                   "strategy.name=ddp", "batch.effective=8", "batch.per_device=1", "batch.accumulation=8",
                   "data.sequence_length=32768")  # fmt: skip
    assert plan.memory.fits is False
    fitting = [item for item in plan.advice if item.verdict in ("fits", "tight")]
    assert fitting
    assert all(item.changes_training for item in fitting)
    with pytest.raises(DoesNotFit, match="the same training"):
        fixed(plan)


def test_the_sweep_holds_every_split_once_at_the_same_batch() -> None:
    """Each cell re-planned gives its bytes; no (split, strategy, checkpointing) stands there twice."""
    plan = resolve(load_recipe("llama-8b-8xh100"))
    cells = sweep(plan, World())
    keys = [(c.per_device, c.gpus, c.strategy, c.checkpointing) for c in cells]
    assert len(set(keys)) == len(keys) > 50
    assert (2, 8, "fsdp", "full") in keys
    for cell in cells[::7]:
        again = resolve(with_change(plan.recipe, cell.change))
        assert again.batch.effective == 256
        assert again.memory.device
        assert (again.memory.device.high, again.memory.verdict) == (cell.device_high, cell.verdict)
