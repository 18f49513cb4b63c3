"""What a plan says of itself that its reader may not expect: steps, rates, a start, a meter. Pure."""

from typing import TYPE_CHECKING

from drumline.plan import schedule
from drumline.plan.batch import Split
from drumline.plan.model import StartFacts
from drumline.plan.noise import is_measurable
from drumline.plan.steps import Clock
from drumline.recipe.schema import Recipe

if TYPE_CHECKING:
    from drumline.plan.start import Parent

_NEAR_THE_PEAK = 0.9
"""A run whose highest rate is less than this part of the peak is warned of."""
_WITHOUT_A_MINIMUM = ("constant", "inverse_sqrt", "piecewise")
"""Schedules that decay to no minimum, so a warm-up of the whole run cuts nothing off."""


def plan_warnings(
    recipe: Recipe,
    split: Split,
    curve: schedule.Curve,
    clock: Clock | None,
    start: StartFacts | None,
    parent: "Parent | None",
) -> list[str]:
    """Warnings of this split, this schedule and this start; `parent`: the checkpoint that it begins from."""
    return [
        *_step_warnings(split, clock),
        *_rate_warnings(recipe, curve, clock),
        *_start_warnings(start, curve, clock),
        *(_model_warnings(recipe, parent) if parent else []),
        *_noise_warnings(recipe, split),
    ]


def _step_warnings(split: Split, clock: Clock | None) -> list[str]:
    if clock is None or split.effective <= clock.samples or clock.remainder != "keep":
        return []
    return [
        f"effective {split.effective} > {clock.samples} samples: every step takes all "
        f"{clock.samples} (remainder: keep)"
    ]


def _rate_warnings(recipe: Recipe, curve: schedule.Curve, clock: Clock | None) -> list[str]:
    """Warn where the rates are not those that the recipe's words make one expect."""
    found = []
    begin = clock.first_step if clock else 1
    facts, ratio = schedule.rate_facts(curve, clock, begin), recipe.schedule.warmup_ratio
    if ratio and curve.warmup_steps == 0:
        found.append(
            f"schedule.warmup_ratio: {ratio:g} × {curve.total} steps = {ratio * curve.total:g} rounds to 0, "
            "so there is no warm-up. Nearest: warmup_steps 2"
        )
    if curve.warmup_steps == curve.total > 1 and curve.name not in _WITHOUT_A_MINIMUM:
        found.append(
            f"the warm-up takes all {curve.total:,} steps, so {curve.name} never begins and the minimum is "
            "not reached. Nearest: a shorter warm-up"
        )
    if facts.highest < _NEAR_THE_PEAK * curve.peak_lr and curve.run is None and begin == 1:
        found.append(
            f"the rate never comes near the peak {curve.peak_lr:g}: it is {facts.highest:g} at most"
        )
    if facts.last == 0 and (curve.unit == "epoch" or curve.total == 1):
        what = "last epoch" if curve.unit == "epoch" else "only step"
        found.append(f"the {what} trains at rate 0: set schedule.min_lr_ratio above 0")
    return found


def _start_warnings(
    start: StartFacts | None, curve: schedule.Curve, clock: Clock | None
) -> list[str]:
    if start is None or (clock is None and curve.unit == "epoch"):
        return []
    from drumline.plan.start import rate_warning

    return rate_warning(start, schedule.rate(curve, start.place.step + 1, clock))


def _model_warnings(recipe: Recipe, parent: "Parent") -> list[str]:
    from drumline.plan.start import model_warnings

    return model_warnings(recipe, parent)


def _noise_warnings(recipe: Recipe, split: Split) -> list[str]:
    is_sharded = recipe.strategy.name == "fsdp"
    if not recipe.logging.noise_scale or is_measurable(is_sharded, split):
        return []
    return ["logging.noise_scale: a step of one micro-batch has nothing to compare; none is logged"]
