"""Detects hung ranks from their heartbeats and names the one that the others wait for."""

import re
import time
from collections.abc import Callable

from drumline.hang_timeout import HangTimeout
from drumline.processes import STACKS_SIGNAL
from drumline.rank_files import Heartbeat, RankFiles
from drumline.supervise.outcome import last_words
from drumline.supervise.ranks import Ranks, RankView

_STACKS_S = 1.0
_REMOTE_STACKS_S = 4.0
"""Longer, because ranks on other hosts poll the shared run folder for the request."""
_COLLECTIVES = ("torch/distributed/", "torch/nn/parallel/distributed.py", "train/step_reduce.py")


class Watchdog:
    """Tracks when each rank's heartbeat last changed; before the first one, since the attempt's start."""

    def __init__(
        self,
        ranks: Ranks,
        hang_timeout: HangTimeout,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks, self._hang_timeout, self._clock = ranks, hang_timeout, clock
        self._moved: dict[int, tuple[Heartbeat | None, float]] = {
            view.rank: (None, clock()) for view in ranks
        }

    def late_ranks(self) -> list[RankView]:
        """Ranks furthest behind, once any rank's heartbeat has not changed for its limit; else none."""
        now = self._clock()
        for view in self._ranks:
            if view.heartbeat != self._moved[view.rank][0] or view.outcome is not None:
                self._moved[view.rank] = (view.heartbeat, now)
        slowest = min(view.heartbeat.done if view.heartbeat else 0 for view in self._ranks)
        self._hang_timeout.time_steps(now, slowest)
        limit_s = self._hang_timeout.limit_s
        if all(now - when < limit_s(heartbeat) for heartbeat, when in self._moved.values()):
            return []
        least = min(view.heartbeat.count if view.heartbeat else 0 for view in self._ranks)
        return [
            view for view in self._ranks if view.heartbeat is None or view.heartbeat.count == least
        ]

    def describe(self, late: list[RankView]) -> str:
        """Make every rank dump its stacks to its log, and describe the hang with the late ranks."""
        files = self._ranks.files
        if not any(view.process or view.heartbeat for view in self._ranks):
            limit_s = self._hang_timeout.limit_s(None)
            end = last_words(files[0].folder)
            return f"no rank has started within {limit_s:g} s; the launcher's log ends:{end}"
        files[0].ask_for_stacks()
        processes = [view.process for view in self._ranks]
        for process in processes:
            if process:
                process.send(STACKS_SIGNAL)
        is_here = all(process and process.is_here for process in processes)
        time.sleep(_STACKS_S if is_here else _REMOTE_STACKS_S)
        if len(late) == len(self._ranks) > 1:  # same phase: find ranks outside a collective
            late = [view for view in late if not _waits_for_others(view.files)] or late
        words = [f"rank {view.rank} ({_where(view.heartbeat)})" for view in late]
        limit_s = self._hang_timeout.limit_s(late[0].heartbeat)
        by_factor = limit_s < self._hang_timeout.timeout_s
        rule = "launch.hang_factor" if by_factor else "launch.hang_timeout_s"
        return (
            f"hang: {', '.join(words)} did not move for {limit_s:g} s ({rule}); "
            f"the stacks of all ranks are in their logs{self._recorded()}"
        )

    def _recorded(self) -> str:
        kept = any(files.collectives.exists() for files in self._ranks.files)
        return ", their last collectives in rank-*.collectives.json" if kept else ""


def _where(heartbeat: Heartbeat | None) -> str:
    return f"step {heartbeat.step}, {heartbeat.words}" if heartbeat else "not started"


def _waits_for_others(files: RankFiles) -> bool:
    """Whether the main thread, whose stack is dumped last in the log, is inside a collective."""
    try:
        text = files.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    dumped = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = [line for line in dumped.splitlines() if line.strip().startswith("File ")]
    return any(name in line for line in frames[:3] for name in _COLLECTIVES)
