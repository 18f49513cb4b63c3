"""A run as it was logged: its record and its lines, whatever they were read from."""

from dataclasses import dataclass, field
from typing import Any

from drumline.metrics_file import Kind


@dataclass(frozen=True)
class Logged:
    """What is known of a run: its record (or a part of it) and its step lines, each step once.

    `events` are lines beside the steps: saves, and saves that failed.
    `until`: compare up to this step only, where a checkpoint was named.
    """

    name: str
    record: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    until: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, plain."""
        return self.record["recipe"]  # type: ignore[no-any-return]

    @property
    def last_step(self) -> int | None:
        """The last step that is known; None where none is."""
        if self.until is not None:
            return self.until
        weights = self.record.get("weights")
        known = [self.steps[-1]["step"]] if self.steps else []
        return max(known + ([weights["step"]] if weights else []), default=None)


Lines = list[dict[str, Any]]


def split_lines(lines: Lines) -> tuple[Lines, Lines, Lines]:
    """Step lines, evaluations, events; of a step that stands there twice, the later one."""
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
