"""How long a job takes and what it uses: a step's estimated time, times its steps. Pure."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from drumline.architectures.gpus import Gpu, find_gpu
from drumline.architectures.shapes import ModelShape
from drumline.plan.model import Plan, Seconds, TimeFacts
from drumline.plan.step_time import (
    FITTED,
    evaluation_seconds,
    rates_of,
    save_seconds,
    step_time,
)

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration

_FITTED_RANGE = (0.8, 1.25)
"""Within which 98 of 100 published runs lie (tests/plan/test_throughput.py)."""
_OTHER_RANGE = (0.6, 1.7)
"""For cards of which no published run was compared; an assumption."""


def with_time(plan: Plan, shape: ModelShape | None, calibration: "Calibration | None") -> Plan:
    """The plan with its time; without where the model's work is not known, or on a CPU."""
    gpu = find_gpu(plan.recipe.cluster.gpu)
    if shape is None or gpu.is_cpu or plan.cost.flops_per_step is None:
        return plan
    found = step_time(plan, shape)
    low, factor, high, basis = _range(plan, gpu, calibration)
    expected = found.total * factor
    step = Seconds(expected * low, expected, expected * high)
    gpus, steps = plan.batch.gpus, plan.steps.total - plan.first_step + 1
    beside = _beside(plan, shape, steps * expected, factor)
    more = sum(seconds or 0.0 for seconds in beside.values())
    hours = Seconds(*(
        (steps * seconds + more * seconds / expected) / 3600
        for seconds in (step.low, expected, step.high)
    ))  # fmt: skip
    gpu_hours, price = hours.expected * gpus, plan.site.gpu_hour_price
    tokens = plan.steps.tokens_per_step
    peak = gpu.narrow_flops
    return replace(
        plan,
        time=TimeFacts(
            step_s=step,
            parts={name: seconds * factor for name, seconds in vars(found).items() if seconds},
            samples_per_s=plan.batch.effective / expected,
            tokens_per_s=tokens / expected if tokens else None,
            mfu=plan.cost.flops_per_step / (expected * peak * gpus) if peak else None,
            hours=hours,
            gpu_hours=gpu_hours,
            energy_kwh=gpu_hours * gpu.watts / 1000 if gpu.watts else None,
            basis=basis + _of_links(plan),
            cost=None if price is None else price * gpu_hours,
            beside=beside,
        ),
    )


def _beside(
    plan: Plan, shape: ModelShape, training: float, factor: float
) -> dict[str, float | None]:
    """Seconds of the run's evaluations, and of waiting for its saves; `training`: of all its steps."""
    recipe, left = plan.recipe, plan.steps.total - plan.first_step + 1
    found: dict[str, float | None] = {}
    if evaluation := recipe.row_evaluation:
        every = evaluation.every_steps or _steps_of(evaluation.every_epochs, plan)
        rows = plan.data.validation_samples
        found["evaluation"] = None
        if rows and every:
            times = math.ceil(left / every) + evaluation.at_start
            found["evaluation"] = factor * times * evaluation_seconds(plan, shape, rows)
    spec = recipe.checkpoint
    every = spec.every_steps or _steps_of(spec.every_epochs, plan) or left
    saves = max(1.0, left / every)
    if spec.every_minutes:
        saves += training / (60 * spec.every_minutes)
    found["saves"] = saves * save_seconds(plan)
    return found


def _steps_of(epochs: float | None, plan: Plan) -> float | None:
    """Optimizer steps of so many epochs; None where there are no epochs, or they are not known."""
    return epochs * plan.steps.per_epoch if epochs and plan.steps.per_epoch else None


def _of_links(plan: Plan) -> str:
    """That the site's measured bandwidths were used, if they were."""
    return "; the site's measured links" if plan.site.within or plan.site.between else ""


def _range(
    plan: Plan, gpu: Gpu, calibration: "Calibration | None"
) -> tuple[float, float, float, str]:
    """Low, expected and high, of which the outer two are shares of the expected, and where they come from."""
    row = calibration.row(gpu.name, plan.recipe.strategy.name) if calibration else None
    if row and row.time:
        low, median, high = row.time
        words = f"measured by {row.runs} runs on {gpu.name}, {row.strategy}"
        return min(0.9, low / median), median, max(1.1, high / median), words
    if gpu.name in FITTED:
        rates = rates_of(gpu)
        words = (
            f"published runs on the same kind of card: {rates.matrices:.0%} of the peak in matrix products, "
            f"{rates.attention:.0%} in attention"
        )
        return _FITTED_RANGE[0], 1.0, _FITTED_RANGE[1], words
    return (
        _OTHER_RANGE[0],
        1.0,
        _OTHER_RANGE[1],
        f"no run on {gpu.name} was compared; typical shares of its peak",
    )
