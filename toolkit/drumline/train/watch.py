"""Between the loop and the process around it: where the loop is, and whether it was asked to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.phases import Phase
from drumline.rank_files import Heartbeat


def _ignore(*told: object) -> None:
    """Nobody listens."""


@dataclass
class Watch:
    """`enter` reports each phase that the loop comes to; `stop_asked` says whether a signal has come.

    All ranks enter the same phases in the same order, so the rank that has entered fewest is the late one.
    `busy_s` is the time spent in forwards (train/forward_timer.py). `wait` reports that the rank lives
    while it waits within a phase, for a disk say. `begun` reports which checkpoint was loaded.
    """

    heartbeat: Callable[[Heartbeat], None] = _ignore
    wait: Callable[[], None] = _ignore
    stop_asked: Callable[[], bool] = lambda: False
    begun: Callable[[dict[str, Any]], None] = _ignore
    step: int = 0
    done: int = 0
    busy_s: float = 0.0

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self.enter(Phase.STEP_BEGINS)

    def enter(self, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        """The loop has come to this phase; it may take `limit_s`, where that is known."""
        self.heartbeat(
            Heartbeat(
                done=self.done,
                step=self.step,
                busy_ms=int(1000 * self.busy_s),
                limit_s=limit_s,
                phase=phase,
                detail=detail,
            )
        )

    def finish(self) -> None:
        """The step that the loop is in counts: its update is made, or skipped."""
        self.done = self.step
