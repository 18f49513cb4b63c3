"""Interface between the loop and its process: reports the loop's phase and carries stop requests."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from drumline.phases import Phase
from drumline.rank_files import Heartbeat

T = TypeVar("T")
_NAMES = {
    Phase.STEP_BEGINS: "forward",
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward",
    Phase.REDUCING: "reduce",
    Phase.UPDATING: "optimizer",
    Phase.EVALUATING: "evaluation",
    Phase.SAVING: "save",
}
"""What the time of a phase is called in the metrics; that before the first step is not among them."""


def _ignore(*told: object) -> None:
    """Do nothing: the default of every callback."""


@dataclass
class Watch:
    """`enter` reports each phase of the loop; `stop_asked` says whether a stop signal has arrived.

    All ranks enter the same phases in the same order, so the rank that has entered fewest is the late one.
    `busy_s` is the time spent in forwards (train/forward_timer.py). `wait` reports progress within a phase
    that waits, for example for a disk. `begun` reports which checkpoint was loaded, `started`
    the seconds of each phase before the first step. `spent` has those of the phases of steps, by this
    process's clock: work of a GPU is waited for in the reduce, whichever phase it was queued in.
    """

    heartbeat: Callable[[Heartbeat], None] = _ignore
    wait: Callable[[], None] = _ignore
    stop_asked: Callable[[], bool] = lambda: False
    begun: Callable[[dict[str, Any]], None] = _ignore
    started: Callable[[dict[str, float]], None] = _ignore
    step: int = 0
    done: int = 0
    busy_s: float = 0.0
    _phase: Phase = Phase.STARTING
    _since_s: float = field(default_factory=time.monotonic)
    _seconds: dict[str, float] = field(default_factory=dict)
    _mark_s: float = field(default_factory=time.monotonic)
    _spent: dict[str, float] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Report that a step begins."""
        self.step = step
        self.enter(Phase.STEP_BEGINS)

    def enter(self, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        """Report that the loop enters this phase, which may take `limit_s` seconds (0: not known)."""
        if phase is not self._phase:
            self._time(phase)
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

    def _time(self, phase: Phase) -> None:
        """Add the seconds of the phase that ends; report all of them when the first step begins."""
        before, self._phase = self._phase, phase
        self._close(_NAMES.get(before))
        if before.is_before_the_first_step:
            now = time.monotonic()
            self._seconds[before] = round(self._seconds.get(before, 0.0) + now - self._since_s, 3)
            self._since_s = now
            if not phase.is_before_the_first_step:
                self.started({str(name): seconds for name, seconds in self._seconds.items()})

    def _close(self, name: str | None) -> None:
        """Count the seconds since the last call as those of `name`; None: they are not counted."""
        now = time.monotonic()
        if name is not None:
            self._spent[name] = self._spent.get(name, 0.0) + now - self._mark_s
        self._mark_s = now

    def reading(self, steps: Iterator[T]) -> Iterator[T]:
        """The steps; the wait for each counts as `data`."""
        while True:
            self._close(_NAMES.get(self._phase))
            step = next(steps, None)
            self._close("data")
            if step is None:
                return
            yield step

    def spent(self) -> dict[str, float]:
        """`time/<name>`: seconds by phase since the last call, as of now."""
        self._close(_NAMES.get(self._phase))
        found, self._spent = self._spent, {}
        return {f"time/{name}": round(seconds, 6) for name, seconds in found.items() if seconds}

    def finish(self) -> None:
        """Count the current step as done: its update was applied or skipped."""
        self.done = self.step
