"""A rank's own watchdog: it leaves by itself where its supervisor does not see that it is stuck.

The supervisor knows who is late and acts first. Where it is gone, frozen, cut off from the run folder, or was
never there (`drumline launch`), every rank writes its stacks to its log and ends, so that no GPU is held for
nothing and whatever started the ranks can start them again.
"""

import contextlib
import faulthandler
import threading
import time
from types import TracebackType
from typing import Self

from toolkit.files import write_text
from toolkit.patience import Patience
from toolkit.rank_files import BeatWriter, RankFiles

_LOOK_S = 0.5
_GRACE_S = 30.0
"""For the supervisor to act first, or once more the limit, if that is shorter."""


class Alarm:
    """Armed while it is entered.

    A thread of Python only winds the clock; what strikes is a thread in C, which a rank that is stuck in C
    with Python's lock cannot hold up.
    """

    def __init__(self, beats: BeatWriter, files: RankFiles, patience: Patience) -> None:
        self._beats, self._files, self._patience = beats, files, patience
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="alarm", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        seen, moved, told = None, time.monotonic(), False
        while True:
            now, beat = time.monotonic(), self._beats.last
            self._patience.time_steps(now, beat.done)
            limit = self._patience.limit(beat)
            grace = min(limit, _GRACE_S)
            if beat != seen:
                seen, moved, told = beat, now, False
                faulthandler.dump_traceback_later(limit + grace, exit=True)
            elif not told and now - moved >= limit + grace / 2:
                told = True
                self._tell(now - moved)
            if self._over.wait(_LOOK_S):
                return

    def _tell(self, seconds: float) -> None:
        """What the supervisor would have asked for: before the first rank ends, and others with it."""
        if self._files.asked().stacks:
            return
        beat = self._beats.last
        print(f"not moved for {seconds:.0f} s: step {beat.step}, {beat.place}", flush=True)
        faulthandler.dump_traceback(all_threads=True)
        keep_collectives(self._files)


def keep_collectives(files: RankFiles) -> None:
    """What torch's flight recorder holds, NCCL's where there is one, else gloo's."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        from torch._C import _distributed_c10d as c10d

        dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(
            c10d, "_dump_fr_trace_json", None
        )
        if dump and (held := dump()):
            write_text(files.collectives, held.decode(errors="replace"))
