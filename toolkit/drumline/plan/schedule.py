"""Learning rate schedules: pure functions of (step, curve), so a resumed run needs no state.

Each function in SCHEDULES gives the rate after warm-up, from 0 (minimum) to 1 (peak). To add one: a function
here, its row in SCHEDULES, its name in `recipe/schema.py`; the invariant tests iterate over the dict.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from drumline.errors import PlanError
from drumline.plan.steps import Clock


@dataclass(frozen=True)
class Curve:
    """A resolved schedule: every number that the learning rate at a step depends on.

    `total`: steps that the curve is drawn over. `run`: steps of the run, None if they are the same; a longer
    one keeps the last rate.
    """

    name: str
    base_lr: float
    peak_lr: float
    min_lr_ratio: float
    total: int
    warmup_steps: int
    unit: Literal["step", "epoch"]
    cycles: int
    power: float
    decay_steps: int
    start_ratio: float
    milestones: list[tuple[int, float]]
    warmup_start_ratio: float = 0.0  # the defaults are for plans that were written without them
    run: int | None = None

    @property
    def last(self) -> int:
        """The last step of the run."""
        return self.total if self.run is None else self.run

    def progress(self, step: int) -> float:
        """Fraction of the steps between warm-up and the last step that are done, in [0, 1]."""
        if self.total == self.warmup_steps:
            return 1.0
        return (step - self.warmup_steps) / (self.total - self.warmup_steps)


def constant(step: int, curve: Curve) -> float:
    """The peak at every step."""
    return 1.0


def linear(step: int, curve: Curve) -> float:
    """A straight line to the minimum at the last step."""
    return 1.0 - curve.progress(step)


def cosine(step: int, curve: Curve) -> float:
    """Half a cosine to the minimum at the last step (Loshchilov and Hutter 2017)."""
    return (1.0 + math.cos(math.pi * curve.progress(step))) / 2.0


def cosine_restarts(step: int, curve: Curve) -> float:
    """`cycles` equal half cosines, each from the peak; the last ends at the minimum."""
    length = curve.total - curve.warmup_steps
    if step >= curve.total or length == 0:
        return 0.0
    within = (step - curve.warmup_steps) * curve.cycles % length
    return (1.0 + math.cos(math.pi * within / length)) / 2.0


def polynomial(step: int, curve: Curve) -> float:
    """(1 - progress) to the `power`."""
    return float((1.0 - curve.progress(step)) ** curve.power)


def inverse_sqrt(step: int, curve: Curve) -> float:
    """sqrt(warmup / step); it does not reach the minimum (Vaswani et al. 2017 §5.3)."""
    return math.sqrt(max(1, curve.warmup_steps) / step)


def wsd(step: int, curve: Curve) -> float:
    """Warmup-stable-decay: the peak, then linear to the minimum over the last `decay_steps` steps."""
    return min(1.0, (curve.total - step) / curve.decay_steps)


def one_cycle(step: int, curve: Curve) -> float:
    """Half a cosine to the minimum, after a cosine warm-up from `start_ratio` (Smith and Topin 2018)."""
    return cosine(step, curve)


def piecewise(step: int, curve: Curve) -> float:
    """The ratio of the last milestone reached; 1 before the first."""
    ratio = 1.0
    for place, value in curve.milestones:
        if step >= place:
            ratio = value
    return ratio


SCHEDULES: dict[str, Callable[[int, Curve], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_restarts": cosine_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
    "one_cycle": one_cycle,
    "piecewise": piecewise,
}


def _linear_rise(step: int, curve: Curve) -> float:
    start = curve.warmup_start_ratio
    return start + (1.0 - start) * step / curve.warmup_steps


def _cosine_rise(step: int, curve: Curve) -> float:
    rise = (1.0 - math.cos(math.pi * step / curve.warmup_steps)) / 2.0
    return curve.start_ratio + (1.0 - curve.start_ratio) * rise


WARMUPS: dict[str, Callable[[int, Curve], float]] = {"one_cycle": _cosine_rise}


def rate_at(curve: Curve, step: int) -> float:
    """The learning rate of one optimizer step, 1 ≤ step ≤ total.

    Warm-up is a line from warmup_start_ratio at step 0 to the peak at step warmup_steps, unless WARMUPS has
    another function for the schedule.
    """
    assert 1 <= step <= curve.last, (step, curve.last)
    step = min(step, curve.total)
    if step <= curve.warmup_steps:
        return curve.peak_lr * WARMUPS.get(curve.name, _linear_rise)(step, curve)
    share = SCHEDULES[curve.name](step, curve)
    return curve.peak_lr * (curve.min_lr_ratio + (1.0 - curve.min_lr_ratio) * share)


def rate(curve: Curve, step: int, clock: Clock | None) -> float:
    """The learning rate of a step; with unit `epoch`, that of the last step of its epoch."""
    if curve.unit == "epoch":
        assert clock is not None
        step = min(curve.total, clock.last_step_of_epoch(clock.epoch(step)))
    return rate_at(curve, step)


@dataclass(frozen=True)
class RateFacts:
    """The rates that a run trains at: of its first step, the highest with its step, of its last."""

    first: float
    highest: float
    highest_step: int
    last: float


def rate_facts(curve: Curve, clock: Clock | None, begin: int = 1) -> RateFacts:
    """The rates of a run; exact, from the few steps at which a schedule can have its highest rate.

    `begin`: the run's first step.
    """
    length = curve.total - curve.warmup_steps
    restarts = {
        curve.warmup_steps - (-cycle * length // curve.cycles) for cycle in range(curve.cycles)
    }
    candidates = {begin, begin + 1, curve.warmup_steps, curve.warmup_steps + 1, *restarts}
    candidates |= {step for step, _ in curve.milestones}
    if curve.unit == "epoch":
        assert clock is not None
        epochs = {clock.epoch(min(max(step, begin), curve.last)) for step in candidates}
        first = clock.epoch(begin)
        epochs |= {epoch + step for epoch in epochs for step in (-1, 1) if epoch + step >= first}
        candidates |= {clock.last_step_of_epoch(epoch - 1) + 1 for epoch in epochs}
    candidates.add(curve.last)
    steps = sorted(step for step in candidates if begin <= step <= curve.last)
    rates = {step: rate(curve, step, clock) for step in steps}
    highest = max(steps, key=lambda step: (rates[step], -step))
    return RateFacts(rates[begin], rates[highest], highest, rate(curve, curve.last, clock))


def check_warmup(curve: Curve, clock: Clock | None) -> None:
    """Raise PlanError for a warm-up that no step would see, because the rate is held within an epoch."""
    if curve.unit != "epoch" or curve.warmup_steps == 0:
        return
    assert clock is not None
    first = min(clock.last_step_of_epoch(1), curve.total)
    if first >= curve.warmup_steps:
        raise PlanError(
            f"schedule: unit epoch holds one rate within an epoch of {first:,} steps, so a warm-up of "
            f"{curve.warmup_steps:,} would not be seen by any step. Nearest: warmup_steps {2 * first} (two "
            "epochs), or unit step"
        )


def check_cycles(cycles: int, total: int, warmup: int) -> None:
    """Raise PlanError for cycles of less than two steps, whose rates would not be half a cosine."""
    if cycles > 1 and 2 * cycles > total - warmup:
        most = (total - warmup) // 2
        raise PlanError(
            f"schedule.cycles: {cycles} in {total - warmup:,} steps is less than two steps each. "
            f"Nearest: cycles {max(1, most)}"
        )


def resolve_warmup(
    steps: int | None, ratio: float | None, name: str, total: int, key: str = "warmup_steps"
) -> int:
    """Warm-up steps of a curve of `total` steps; if neither is given, 30 % of it for one_cycle, else 0.

    Raises PlanError if `steps`, which come from the recipe's `key`, exceed the curve.
    """
    if steps is None and ratio is None:
        return max(1, round(0.3 * total)) if name == "one_cycle" else 0
    if ratio is not None:
        return round(ratio * total)
    assert steps is not None
    if steps > total:
        raise PlanError(
            f"schedule.{key}: {steps} > {total} steps of the whole run, so the peak is never reached. "
            f"Nearest: warmup_steps {max(1, total // 10)}, or duration.steps above {steps}, or horizon_steps "
            f"{10 * steps} if the run is to end before its schedule"
        )
    return steps


def resolve_milestones(milestones: dict[str, float], total: int) -> list[tuple[int, float]]:
    """Milestones as (step, ratio); keys below 1 are fractions of the run, rounded to the nearest step.

    Raises PlanError if a milestone is beyond the run, before its first step, or at the step of another.
    """
    result: list[tuple[int, float]] = []
    for place, value in milestones.items():
        number = float(place)
        step = round(number * total) if number < 1 else int(number)
        if step < 1 or (result and result[-1][0] == step):
            where = "before the first step" if step < 1 else f"step {step}, as the one before"
            raise PlanError(
                f"schedule.milestones: {place} × {total} steps is {where}. Nearest: a larger fraction, or "
                "fewer milestones"
            )
        if step > total:
            raise PlanError(
                f"schedule.milestones: step {place} > {total} steps of the run. "
                "Nearest: a fraction of the run, such as 0.9"
            )
        result.append((step, value))
    return result
