"""How long a rank may stay in one phase before it counts as hung; the rank and the supervisor share it."""

import statistics
from collections import deque
from dataclasses import dataclass, field

from drumline.phases import Phase
from drumline.rank_files import Heartbeat

_REMOTE_START_S = 900.0
"""Until a rank on another host reports: its image may have to be fetched first."""
_FEWEST_STEPS = 10
"""Number of step times needed before `hang_factor` applies."""
_SHORTEST_S = 5.0
"""Lower bound of the timeout from `hang_factor`, in seconds."""


@dataclass
class HangTimeout:
    """Hang timeout of a phase: `timeout_s`; within a step, `factor` × the median step time if shorter.

    Each phase before the first step has its own (`phases.py`). `is_remote`: the ranks are on other hosts.
    """

    timeout_s: float
    factor: float | None = None
    is_remote: bool = False
    _steps_s: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=64))
    _done: tuple[int, float] | None = field(init=False, default=None)

    def limit_s(self, heartbeat: Heartbeat | None) -> float:
        """Seconds that a rank may stay at this heartbeat; a rank without one is still starting.

        Outside of steps, a heartbeat's own `limit_s` (such as the time to save a known number of bytes)
        replaces `timeout_s` if it is longer.
        """
        if heartbeat is None:
            return _REMOTE_START_S if self.is_remote else Phase.STARTING.start_limit_s
        if heartbeat.phase.is_before_the_first_step:
            return max(heartbeat.phase.start_limit_s, heartbeat.limit_s, self.timeout_s)
        if self.factor and heartbeat.phase.is_in_a_step and len(self._steps_s) >= _FEWEST_STEPS:
            by_factor = max(_SHORTEST_S, self.factor * statistics.median(self._steps_s))
            return min(self.timeout_s, by_factor)
        return max(self.timeout_s, heartbeat.limit_s)

    def time_steps(self, now: float, done: int) -> None:
        """Record that `done` steps are finished at `now`, in seconds of any monotonic clock."""
        if self._done and done > self._done[0]:
            self._steps_s.append((now - self._done[1]) / (done - self._done[0]))
        if not self._done or done != self._done[0]:
            self._done = (done, now)
