"""Finds ranks whose forwards are slower than the median, and names them with their host."""

import statistics

from drumline.supervise.ranks import Ranks

STEPS = 20
"""Number of steps over which the ranks are compared."""
_LEAST_MS = 5.0
"""Differences smaller than this many milliseconds per step are not reported."""


class Stragglers:
    """Compares the time per step that each rank spends in forwards; `ratio` None turns it off."""

    def __init__(self, ranks: Ranks, ratio: float | None) -> None:
        self._ranks, self._ratio = ranks, ratio
        self._mark: list[tuple[int, int]] | None = None
        self._named: set[int] = set()

    def look(self) -> str:
        """Describe the ranks that are slow now and were not at the last comparison; "" if there are none."""
        if self._ratio is None or len(self._ranks) < 2:
            return ""
        heartbeats = [view.heartbeat for view in self._ranks if view.heartbeat]
        if len(heartbeats) < len(self._ranks):
            return ""
        now = [(heartbeat.done, heartbeat.busy_ms) for heartbeat in heartbeats]
        if self._mark is None:
            self._mark = now
        steps = [new[0] - old[0] for new, old in zip(now, self._mark, strict=True)]
        if min(steps) < STEPS:
            return ""
        each_ms = [
            (new[1] - old[1]) / count
            for new, old, count in zip(now, self._mark, steps, strict=True)
        ]
        self._mark = now
        return self._words(each_ms)

    def _words(self, each_ms: list[float]) -> str:
        """Describe the new ranks above the ratio; `each_ms` holds each rank's milliseconds per step."""
        assert self._ratio
        usual = statistics.median_low(each_ms)
        least = max(self._ratio * usual, usual + _LEAST_MS)
        slow = {rank for rank, ms in enumerate(each_ms) if ms > least}
        new, self._named = slow - self._named, slow
        words = [
            f"rank {rank} on {self._host(rank)}: its forwards take {each_ms[rank]:,.0f} ms a step, "
            f"the median is {usual:,.0f}"
            for rank in sorted(new)
        ]
        if not words:
            return ""
        return f"straggler: {'; '.join(words)} (launch.straggler_ratio {self._ratio:g})"

    def _host(self, rank: int) -> str:
        return str(
            (self._ranks.files[rank].device() or {}).get("host", "a host that it has not told")
        )
