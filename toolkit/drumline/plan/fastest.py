"""The fastest way to split a training over its GPUs that fits, by the cost model of the advice. Pure."""

import itertools
from collections.abc import Iterator

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.plan.advise import Change, with_change
from drumline.plan.checks import LAUNCHER_STRATEGIES
from drumline.plan.cost import gpu_seconds
from drumline.plan.model import Plan
from drumline.plan.resolve import World, resolve, shape_of
from drumline.units import divisors

_MOST_PER_DEVICE = 64


def fastest_that_fits(plan: Plan, world: World) -> Change | None:
    """The change of per_device, accumulation, strategy, checkpointing and chunked loss that takes least time.

    The training stays the same: effective batch, GPUs, precision and launcher do. Of equally fast ones that
    with the fewest micro-batches, each of which has costs of its own, then that with the least memory. None
    where the model's memory is not known, or nothing fits.
    """
    shape = shape_of(plan.recipe, world)
    if isinstance(shape, str) or plan.memory.device is None:
        return None
    best: tuple[tuple[float, int, int], Change] | None = None
    for change in _changes(plan, shape):
        try:
            found = resolve(with_change(plan.recipe, change), world, is_candidate=True)
        except PlanError:
            continue
        if found.memory.verdict != "fits" or found.memory.device is None:
            continue
        seconds = round(gpu_seconds(found, shape), 6)
        rank = (seconds, found.batch.accumulation, found.memory.device.high)
        if best is None or rank < best[0]:
            best = (rank, change)
    return best[1] if best else None


def _changes(plan: Plan, shape: ModelShape) -> Iterator[Change]:
    recipe, batch = plan.recipe, plan.batch
    share = batch.effective // batch.gpus
    strategies = (
        LAUNCHER_STRATEGIES[recipe.launch.launcher] if batch.gpus > 1 else (recipe.strategy.name,)
    )
    chunked = (
        (False, True)
        if recipe.data.facts.is_shifted and not shape.patches
        else (recipe.loss.chunked,)
    )
    sizes = [b for b in divisors(share) if b <= _MOST_PER_DEVICE]
    for b, strategy, policy, is_chunked in itertools.product(
        sizes, strategies, ("none", "selective", "full"), chunked
    ):
        change: Change = {
            "batch": {"per_device": b, "accumulation": share // b},
            "strategy": {
                "name": strategy,
                "shard": recipe.strategy.shard if strategy == "fsdp" else "all",
            },
            "model": {"activation_checkpointing": policy},
            "loss": {"chunked": is_chunked},
        }
        if recipe.row_evaluation and (recipe.row_evaluation.per_device or b) > b:
            change["evaluation"] = {"per_device": b}
        yield change
