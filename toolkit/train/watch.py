"""Between a rank and its supervisor: where the loop is, and whether to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Watch:
    """`at` tells each place that the loop comes to; `stop_asked` says whether a signal has come.

    All ranks pass the same places in the same order, so the rank with the fewest is the late one.
    `busy_s` is the time spent in forwards (toolkit/train/busy.py).
    `wait` tells that the rank lives while it waits, for a disk say; it is no place. `begun` tells
    which checkpoint was loaded.
    """

    beat: Callable[[int, int, str, int], None] = lambda done, step, place, busy_ms: None
    wait: Callable[[], None] = lambda: None
    stop_asked: Callable[[], bool] = lambda: False
    begun: Callable[[dict[str, Any]], None] = lambda facts: None
    step: int = 0
    done: int = 0
    busy_s: float = 0.0

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self.at("begin")

    def at(self, place: str) -> None:
        """The loop has come to this place in the step."""
        self.beat(self.done, self.step, place, int(1000 * self.busy_s))

    def finish(self) -> None:
        """The step that the loop is in counts: its update is made, or skipped."""
        self.done = self.step
