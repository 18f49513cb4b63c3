"""Interface between the loop and its process: reports the loop's phase and carries stop requests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.phases import Phase
from drumline.rank_files import Heartbeat


def _ignore(*told: object) -> None:
    """Do nothing: the default of every callback."""


@dataclass
class Watch:
    """`enter` reports each phase of the loop; `stop_asked` says whether a stop signal has arrived.

    All ranks enter the same phases in the same order, so the rank that has entered fewest is the late one.
    `busy_s` is the time spent in forwards (train/forward_timer.py). `wait` reports progress within a phase
    that waits, for example for a disk. `begun` reports which checkpoint was loaded.
    """

    heartbeat: Callable[[Heartbeat], None] = _ignore
    wait: Callable[[], None] = _ignore
    stop_asked: Callable[[], bool] = lambda: False
    begun: Callable[[dict[str, Any]], None] = _ignore
    step: int = 0
    done: int = 0
    busy_s: float = 0.0

    def begin(self, step: int) -> None:
        """Report that a step begins."""
        self.step = step
        self.enter(Phase.STEP_BEGINS)

    def enter(self, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        """Report that the loop enters this phase, which may take `limit_s` seconds (0: not known)."""
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
        """Count the current step as done: its update was applied or skipped."""
        self.done = self.step
