"""The fastest ways to split a training over its GPUs that fit, by the estimate of step time. Pure."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.plan.advise import Change, changed_step_seconds, strategy_of, with_change
from drumline.plan.checks import LAUNCHER_STRATEGIES
from drumline.plan.job_time import with_time
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.world import World
from drumline.units import divisors, format_bytes

_MOST_PER_DEVICE = 64
_FASTER = 0.999
"""Of another change's time."""


@dataclass(frozen=True)
class Lost:
    """A change that is not among the fastest that fit, and why."""

    change: Change
    why: str


@dataclass(frozen=True)
class Search:
    """Plans with the changes that make them, fastest first; those that lost, fastest first, too.

    `slower`: how many more were not planned, since as many as were wanted are faster.
    """

    found: list[tuple[Change, Plan]]
    lost: list[Lost]
    slower: int


def fastest_that_fits(plan: Plan, world: World) -> Change | None:
    """The first change of `search`; None where the model's memory is not known, or nothing fits."""
    found = search(plan, world, count=1)
    return found.found[0][0] if found and found.found else None


def search(plan: Plan, world: World, count: int) -> Search | None:
    """The `count` fastest changes of split, strategy, checkpointing, offload and chunked loss that fit.

    The training stays the same: effective batch, GPUs, precision and launcher do. Of equally fast ones those
    with the fewest micro-batches come first. None where memory or the time of a step is not known.
    """
    shape = shape_of(plan.recipe, world)
    if isinstance(shape, str) or plan.memory.device is None:
        return None
    ranked = sorted(
        candidates(plan, shape),
        key=lambda item: (round(item[0], 6), item[1]["batch"]["accumulation"]),
    )
    found: list[tuple[Change, Plan]] = []
    lost: list[Lost] = []
    for number, (_, change) in enumerate(ranked):
        if len(found) == count:
            return Search(found, lost, len(ranked) - number)
        try:
            other = resolve(with_change(plan.recipe, change), world, is_candidate=True)
        except PlanError as error:
            lost.append(Lost(change, str(error).partition(". Nearest")[0]))
            continue
        memory = other.memory
        if memory.verdict == "fits":
            found.append((change, with_time(other, shape, world.calibration)))
        elif memory.device and memory.capacity:
            words = "does not fit" if memory.verdict == "does_not_fit" else "may not fit"
            sizes = f"up to {format_bytes(memory.device.high)} of {format_bytes(memory.capacity)}"
            lost.append(Lost(change, f"{words}: {sizes}"))
    return Search(found, lost, 0)


def candidates(plan: Plan, shape: ModelShape) -> Iterator[tuple[float, Change]]:
    """The changes, each with the seconds that its step would take.

    Without those that keep more weights or gradients than a change before them and are no faster.
    """
    fastest: dict[str, float] = {}
    for change in _changes(plan, shape):
        seconds = changed_step_seconds(plan, shape, change)
        same = str(change | {"strategy": change["strategy"] | {"reshard": "", "reduce": ""}})
        if seconds < _FASTER * fastest.get(same, math.inf):
            fastest[same] = seconds
            yield seconds, change


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
    for b, strategy, (policy, is_offloaded), is_chunked in itertools.product(
        sizes, strategies, _CHECKPOINTING, chunked
    ):
        for offload, reshard, reduce in _policies(strategy, share // b, recipe.logging.noise_scale):
            change: Change = {
                "batch": {"per_device": b, "accumulation": share // b},
                "strategy": {
                    **strategy_of(recipe, strategy),
                    "offload": offload,
                    "reshard": reshard,
                    "reduce": reduce,
                },
                "model": {
                    "activation_checkpointing": policy,
                    "activation_offload": is_offloaded,
                },
                "loss": {"chunked": is_chunked},
            }
            if recipe.row_evaluation and (recipe.row_evaluation.per_device or b) > b:
                change["evaluation"] = {"per_device": b}
            yield change


def _policies(strategy: str, accumulation: int, noise: bool) -> list[tuple[str, str, str]]:
    """Where the optimizer's state is, when gathered weights are freed, and when gradients are reduced.

    Policies that differ only from the second micro-batch on are left out where there is one.
    """
    found = [("none", "forward", "micro_batch")]
    if strategy.startswith("zero"):
        found.append(("optimizer", "forward", "micro_batch"))
    if strategy == "fsdp":
        found.append(("none", "backward", "micro_batch"))
    if strategy == "fsdp" and accumulation > 1:
        found.append(("none", "step", "micro_batch"))
        if not noise:
            found += [("none", reshard, "step") for reshard in ("forward", "backward", "step")]
    return found


_CHECKPOINTING = (("none", False), ("selective", False), ("full", False), ("full", True))
"""Policies, each with whether kept activations go to the host's memory."""
