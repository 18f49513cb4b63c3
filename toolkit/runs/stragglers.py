"""Names ranks that compute more slowly than the others, with their host."""

import statistics

from toolkit.rank_files import RankFiles

STEPS = 20
"""Compared over so many steps at a time."""
_LEAST_MS = 5.0
"""A difference smaller than this a step is not worth a word."""


class Stragglers:
    """Compares what the ranks tell of their forwards."""

    def __init__(self, ranks: list[RankFiles], ratio: float | None) -> None:
        self._ranks, self._ratio = ranks, ratio
        self._mark: list[tuple[int, int]] | None = None
        self._named: set[int] = set()

    def look(self) -> str:
        """Words about ranks that are slow now and have not been named; else nothing."""
        if self._ratio is None or len(self._ranks) < 2:
            return ""
        first = self._ranks[0].beat()
        if first is None or (self._mark and first.done - self._mark[0][0] < STEPS):
            return ""  # one file is read often, those of all ranks seldom
        beats = [files.beat() for files in self._ranks]
        told = [(beat.done, beat.busy_ms) for beat in beats if beat]
        if len(told) < len(beats):
            return ""
        if self._mark is None:
            self._mark = told
        steps = [now[0] - before[0] for now, before in zip(told, self._mark, strict=True)]
        if min(steps) < STEPS:
            return ""
        each = [
            (now[1] - before[1]) / count
            for now, before, count in zip(told, self._mark, steps, strict=True)
        ]
        self._mark = told
        return self._words(each)

    def _words(self, each: list[float]) -> str:
        """Of the ranks beyond the ratio, in milliseconds a step."""
        assert self._ratio
        usual = statistics.median_low(each)
        least = max(self._ratio * usual, usual + _LEAST_MS)
        slow = {rank for rank, ms in enumerate(each) if ms > least}
        new, self._named = slow - self._named, slow
        words = [
            f"rank {rank} on {self._host(rank)}: its forwards take {each[rank]:,.0f} ms a step, the median "
            f"is {usual:,.0f}"
            for rank in sorted(new)
        ]
        if not words:
            return ""
        return f"straggler: {'; '.join(words)} (launch.straggler_ratio {self._ratio:g})"

    def _host(self, rank: int) -> str:
        return str((self._ranks[rank].device() or {}).get("host", "a host that it has not told"))
