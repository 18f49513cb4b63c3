"""Measured and planned seconds of an optimizer step in an attempt's entry of the record."""

import itertools
import statistics
from typing import Any

from drumline.metrics_file import lines_from_end
from drumline.plan.model import Plan
from drumline.runs.folder import RunFolder

_MOST = 200
"""Steps whose median is taken: the last ones."""
_FIRST = 3
"""Steps of an attempt that are slower, as memory is taken and kernels are chosen."""


def time_entry(plan: Plan, folder: RunFolder, before: int) -> dict[str, float | None]:
    """Seconds of a step: planned (expected), and the median of those that the attempt took last.

    `before`: the step that the attempt went on from. None where the time is not planned, or too few steps
    were logged.
    """
    first = before + _FIRST
    lines = (line for _, line in lines_from_end(folder.metrics_file) if line)
    of_steps = (line for line in lines if line.get("kind") == "step" and "seconds" in line)
    since = itertools.takewhile(lambda line: line["step"] > first, of_steps)
    seconds = [float(line["seconds"]) for line in itertools.islice(since, _MOST)]
    return {
        "planned_s": plan.time.step_s.expected if plan.time else None,
        "measured_s": statistics.median(seconds) if seconds else None,
    }


def time_words(entry: dict[str, Any] | None, plan: Plan) -> str:
    """How long a step took against what was planned; empty where either is not known."""
    measured = (entry or {}).get("measured_s")
    if not measured or plan.time is None:
        return ""
    planned = plan.time.step_s
    is_inside = planned.low <= measured <= planned.high
    where = "within" if is_inside else "outside"
    return (
        f"a step took {measured:.3g} s; planned were {planned.expected:.3g} s, {where} {planned.low:.3g} to "
        f"{planned.high:.3g}"
    )
