"""How long a rank may stay where it is; the rule that a rank and its supervisor share."""

import statistics
from collections import deque
from dataclasses import dataclass, field

from toolkit.rank_files import Beat

_STARTING = ("imports", "joining the others", "model", "load", "warm-up")
_START_S = 600.0
"""Before the first step (imports, a large checkpoint, a compilation) at least so long is allowed."""
_IN_A_STEP = ("begin", "forward", "backward", "agreement", "update")
_FEWEST_STEPS = 10
_SHORTEST_S = 5.0
"""A factor needs a median to multiply, and never makes anybody more nervous than this."""


@dataclass
class Patience:
    """`timeout_s` everywhere; in a step `factor` times the median of the last steps, if that is shorter."""

    timeout_s: float
    factor: float | None = None
    _steps_s: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=64))
    _done: tuple[int, float] | None = field(init=False, default=None)

    def limit(self, beat: Beat | None) -> float:
        """Seconds that a rank may stay at this beat; one without a beat is still starting."""
        if beat is None or beat.place in _STARTING:
            return max(self.timeout_s, _START_S)
        if (
            self.factor
            and len(self._steps_s) >= _FEWEST_STEPS
            and beat.place.startswith(_IN_A_STEP)
        ):
            by_factor = max(_SHORTEST_S, self.factor * statistics.median(self._steps_s))
            return min(self.timeout_s, by_factor)
        return self.timeout_s

    def time_steps(self, now: float, done: int) -> None:
        """Learn how long steps take: at `now`, in seconds of any clock, so many are done."""
        if self._done and done > self._done[0]:
            self._steps_s.append((now - self._done[1]) / (done - self._done[0]))
        if not self._done or done != self._done[0]:
            self._done = (done, now)
