"""State of an attempt's ranks, read from their files at a limited rate."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.phases import Phase
from drumline.processes import Process
from drumline.rank_files import Heartbeat, RankFiles

_SHORTEST_LOOK_S = 0.1
_FILES_PER_S = 256
"""Upper bound on heartbeat files read per second, for any number of ranks (benchmarks/supervisor.py)."""


@dataclass
class RankView:
    """One rank as last read; `outcome` is its outcome file, `is_gone` whether its process has exited."""

    files: RankFiles
    heartbeat: Heartbeat | None = None
    outcome: dict[str, Any] | None = None
    is_gone: bool = False

    @property
    def rank(self) -> int:
        """The rank's number."""
        return self.files.rank

    @property
    def process(self) -> Process | None:
        """The rank's process, once it has started."""
        return self.files.process()

    @property
    def has_died(self) -> bool:
        """Whether the rank's process, on this host, has exited without an outcome file."""
        return self.is_gone and self.outcome is None

    def refresh(self) -> None:
        """Read the heartbeat, and the outcome once the rank has ended or its process is gone."""
        if self.outcome is not None:
            return
        self.heartbeat = self.files.heartbeat() or self.heartbeat
        process = self.files.process()
        self.is_gone = process is not None and process.is_here and not process.is_alive
        if self.is_gone or (self.heartbeat and self.heartbeat.phase is Phase.ENDED):
            self.outcome = self.files.outcome()


class Ranks:
    """All ranks of an attempt, as last read."""

    def __init__(self, logs: Path, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.views = [RankView(RankFiles(logs, rank)) for rank in range(count)]
        self._clock = clock
        self._interval_s = max(_SHORTEST_LOOK_S, count / _FILES_PER_S)
        self._next = float("-inf")

    def __iter__(self) -> Iterator[RankView]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    @property
    def files(self) -> list[RankFiles]:
        """The files of each rank, in rank order."""
        return [view.files for view in self.views]

    def is_due(self) -> bool:
        """Whether the next refresh is due."""
        return self._clock() >= self._next

    def refresh(self) -> None:
        """Read every rank's files now."""
        for view in self.views:
            view.refresh()
        self._next = self._clock() + self._interval_s

    @property
    def have_failed(self) -> bool:
        """Whether some rank reported a failure or died."""
        return any(
            view.has_died or (view.outcome and view.outcome["outcome"] == "failed")
            for view in self.views
        )

    @property
    def have_all_ended(self) -> bool:
        """Whether every rank has an outcome."""
        return all(view.outcome for view in self.views)

    @property
    def died(self) -> list[int]:
        """Ranks that exited without an outcome file."""
        return [view.rank for view in self.views if view.has_died]

    @property
    def alive(self) -> list[RankView]:
        """Ranks whose process runs on this host."""
        return [view for view in self.views if (p := view.process) and p.is_alive]

    @property
    def steps_done(self) -> int:
        """Largest number of steps that any rank has finished."""
        return max((view.heartbeat.done for view in self.views if view.heartbeat), default=0)
