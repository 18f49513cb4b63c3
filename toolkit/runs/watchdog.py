"""Finds ranks that have stopped moving, and says which one the others wait for."""

import re
import time
from collections.abc import Callable

from toolkit.patience import Patience
from toolkit.processes import STACKS_SIGNAL
from toolkit.rank_files import Beat, RankFiles

_STACKS_S = 1.0
_REMOTE_STACKS_S = 4.0
"""Ranks of other hosts look for what is asked of them once a second."""
_COLLECTIVES = ("torch/distributed/", "torch/nn/parallel/distributed.py", "agreement.py")


class Watchdog:
    """Notes when each rank last moved; a rank without a beat counts from the attempt's start."""

    def __init__(
        self,
        ranks: list[RankFiles],
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranks, self._patience, self._clock = ranks, patience, clock
        self._moved: dict[int, tuple[Beat | None, float]] = {
            files.rank: (None, clock()) for files in ranks
        }

    def stuck(self) -> list[RankFiles]:
        """The ranks that the others wait for, once one has not moved for the timeout; else none."""
        now, beats = self._clock(), {}
        for files in self._ranks:
            beats[files.rank] = beat = files.beat()
            if beat != self._moved[files.rank][0] or files.outcome() is not None:
                self._moved[files.rank] = (beat, now)
        slowest = min(beat.done if beat else 0 for beat in beats.values())
        self._patience.time_steps(now, slowest)
        if all(now - when < self._patience.limit(beat) for beat, when in self._moved.values()):
            return []
        least = min(beat.count if beat else 0 for beat in beats.values())
        return [
            files
            for files in self._ranks
            if (found := beats[files.rank]) is None or found.count == least
        ]

    def describe(self, late: list[RankFiles]) -> str:
        """Writes every rank's stacks to its log and names the late ones."""
        self._ranks[0].ask_for_stacks()
        for files in self._ranks:
            if process := files.process():
                process.send(STACKS_SIGNAL)
        is_here = all((p := files.process()) and p.is_here for files in self._ranks)
        time.sleep(_STACKS_S if is_here else _REMOTE_STACKS_S)
        if len(late) == len(self._ranks) > 1:  # all at the same place: who is not in a collective?
            late = [files for files in late if not _waits_for_others(files)] or late
        words = [f"rank {files.rank} ({_place(files.beat())})" for files in late]
        limit = self._patience.limit(late[0].beat())
        by_factor = limit < self._patience.timeout_s
        rule = "launch.hang_factor" if by_factor else "launch.hang_timeout_s"
        return (
            f"hang: {', '.join(words)} did not move for {limit:g} s ({rule}); "
            f"the stacks of all ranks are in their logs{self._recorded()}"
        )

    def _recorded(self) -> str:
        kept = any(files.collectives.exists() for files in self._ranks)
        return ", their last collectives in rank-*.collectives.json" if kept else ""


def _place(beat: Beat | None) -> str:
    return f"step {beat.step}, {beat.place}" if beat else "not started"


def _waits_for_others(files: RankFiles) -> bool:
    """Whether the main thread's stack, the last in the log, ends inside a collective."""
    try:
        text = files.log.read_text(errors="replace")
    except OSError:
        return False
    dumped = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    frames = [line for line in dumped.splitlines() if line.strip().startswith("File ")]
    return any(name in line for line in frames[:3] for name in _COLLECTIVES)
