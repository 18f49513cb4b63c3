"""A logged run: its record and its metrics lines, independent of the source that they were read from."""

from dataclasses import dataclass, field
from typing import Any

from drumline.metrics_file import Kind


@dataclass(frozen=True)
class Logged:
    """A run's record (or part of it) and its step lines, one per step.

    `events` are the lines of kind event: saves and failed saves. `until`: compare only up to this step,
    because the source is the checkpoint of that step.
    """

    name: str
    record: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    until: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return self.record["recipe"]  # type: ignore[no-any-return]

    @property
    def last_step(self) -> int | None:
        """The last known step; None if there is none."""
        if self.until is not None:
            return self.until
        weights = self.record.get("weights")
        known = [self.steps[-1]["step"]] if self.steps else []
        return max(known + ([weights["step"]] if weights else []), default=None)


Lines = list[dict[str, Any]]


def split_lines(lines: Lines) -> tuple[Lines, Lines, Lines]:
    """Split into step, evaluation and event lines; if a step occurs twice, its later line is kept."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    events = []
    for line in lines:
        if line["kind"] == Kind.STEP:
            steps[line["step"]] = line
        elif line["kind"] == Kind.EVALUATION:
            evaluations[line["step"]] = line
        else:
            events.append(line)
    return [steps[n] for n in sorted(steps)], [evaluations[n] for n in sorted(evaluations)], events
