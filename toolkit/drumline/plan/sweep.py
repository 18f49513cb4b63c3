"""Sweep over splits and strategies of one recipe at the same effective batch: which of them fit. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drumline.errors import PlanError
from drumline.memory.ranges import Verdict
from drumline.plan.advise import strategy_of, with_change
from drumline.plan.checks import LAUNCHER_STRATEGIES
from drumline.plan.mesh import gpus_per_node
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.units import divisors

MOST_PER_DEVICE = 8
MOST_GPUS = 5


@dataclass(frozen=True)
class Cell:
    """One plan of the sweep: `device.high` in bytes, the verdict, and the change that leads to it."""

    per_device: int
    gpus: int
    strategy: str
    checkpointing: str
    device_high: int
    verdict: Verdict
    change: dict[str, Any]


def sweep(plan: Plan, world: World) -> list[Cell]:
    """Plan per_device × gpus × strategy × checkpointing.

    Combinations that are illegal or whose memory is not known are left out.
    """
    recipe = plan.recipe
    strategies = LAUNCHER_STRATEGIES[recipe.launch.launcher]
    cells = []
    for gpus in _gpu_counts(plan):
        for b in _nearest(divisors(plan.batch.effective // gpus), plan.batch.per_device):
            for strategy in strategies:
                for checkpointing in ("none", "selective", "full"):
                    change = _change(plan, b, gpus, strategy, checkpointing)
                    try:
                        changed = with_change(recipe, change)
                        found = resolve(changed, world, is_candidate=True).memory
                    except PlanError:
                        continue
                    if found.device:
                        high = found.device.high
                        cells.append(
                            Cell(b, gpus, strategy, checkpointing, high, found.verdict, change)
                        )
    return cells


def _gpu_counts(plan: Plan) -> Iterator[int]:
    """The plan's number of GPUs, repeatedly doubled and halved (rounded down).

    Only numbers that divide the effective batch; of these the MOST_GPUS nearest.
    """
    batch = plan.batch
    counts = {batch.gpus}
    for step in range(1, MOST_GPUS):
        counts |= {batch.gpus << step, batch.gpus >> step}
    legal = [n for n in counts if n and batch.effective % n == 0]
    yield from _nearest(sorted(legal), batch.gpus, MOST_GPUS)


def _nearest(ordered: list[int], wanted: int, most: int = MOST_PER_DEVICE) -> list[int]:
    """The `most` numbers nearest to the wanted one by ratio, in ascending order."""
    ranked = sorted(ordered, key=lambda n: max(n / wanted, wanted / n))
    return sorted(ranked[:most])


def _change(plan: Plan, b: int, gpus: int, strategy: str, checkpointing: str) -> dict[str, Any]:
    recipe, batch = plan.recipe, plan.batch
    per_node = gpus_per_node(recipe, batch.gpus)
    stated = recipe.cluster.gpus_per_node is not None
    change: dict[str, Any] = {
        "batch": {"per_device": b, "gpus": gpus, "accumulation": batch.effective // gpus // b},
        "strategy": strategy_of(recipe, strategy),
        "model": {"activation_checkpointing": checkpointing},
        "cluster": {"nodes": None, "gpus_per_node": per_node if stated else None},
    }  # fmt: skip
    if recipe.row_evaluation and (recipe.row_evaluation.per_device or b) > b:
        change["evaluation"] = {"per_device": b}
    return change
