"""Finds ranks that have stopped moving, and says which one the others wait for."""

import re
import statistics
import time
from collections import deque
from collections.abc import Callable

from toolkit.processes import STACKS_SIGNAL
from toolkit.rank_files import Beat, RankFiles

_STACKS_S = 1.0
_REMOTE_STACKS_S = 4.0
"""Ranks of other hosts look for what is asked of them once a second."""
_STARTING = ("imports", "joining the others", "model", "load", "warm-up")
_START_S = 600.0
"""Before the first step (imports, a large checkpoint, a compilation) at least so long is allowed."""
_IN_A_STEP = ("begin", "forward", "backward", "agreement", "update")
_FEWEST_STEPS = 10
_SHORTEST_S = 5.0
"""A factor needs a median to multiply, and never makes the watchdog more nervous than this."""
_COLLECTIVES = ("torch/distributed/", "torch/nn/parallel/distributed.py", "agreement.py")


class Watchdog:
    """Notes when each rank last moved; a rank without a beat counts from the attempt's start."""

    def __init__(
        self,
        ranks: list[RankFiles],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        factor: float | None = None,
    ) -> None:
        self._ranks, self._timeout_s, self._clock, self._factor = ranks, timeout_s, clock, factor
        self._steps_s: deque[float] = deque(maxlen=64)
        self._done: tuple[int, float] | None = None
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
        self._time_steps(now, list(beats.values()))
        if all(now - when < self._limit(beat) for beat, when in self._moved.values()):
            return []
        least = min(beat.count if beat else 0 for beat in beats.values())
        return [
            files
            for files in self._ranks
            if (found := beats[files.rank]) is None or found.count == least
        ]

    def _limit(self, beat: Beat | None) -> float:
        if beat is None or beat.place in _STARTING:
            return max(self._timeout_s, _START_S)
        if (
            self._factor
            and len(self._steps_s) >= _FEWEST_STEPS
            and beat.place.startswith(_IN_A_STEP)
        ):
            by_factor = max(_SHORTEST_S, self._factor * statistics.median(self._steps_s))
            return min(self._timeout_s, by_factor)
        return self._timeout_s

    def _time_steps(self, now: float, beats: list[Beat | None]) -> None:
        """How long the last steps took, by the slowest rank."""
        done = min(beat.done if beat else 0 for beat in beats)
        if self._done and done > self._done[0]:
            self._steps_s.append((now - self._done[1]) / (done - self._done[0]))
        if not self._done or done != self._done[0]:
            self._done = (done, now)

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
        return (
            f"hang: {', '.join(words)} did not move for {self._limit(late[0].beat()):g} s "
            f"({self._rule(late[0].beat())}); the stacks of all ranks are in their logs"
            f"{self._recorded()}"
        )

    def _recorded(self) -> str:
        kept = any(files.collectives.exists() for files in self._ranks)
        return ", their last collectives in rank-*.collectives.json" if kept else ""

    def _rule(self, beat: Beat | None) -> str:
        by_factor = self._factor and self._limit(beat) < self._timeout_s
        return "launch.hang_factor" if by_factor else "launch.hang_timeout_s"


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
