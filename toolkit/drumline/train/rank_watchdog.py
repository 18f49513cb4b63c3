"""Each rank's own watchdog, for hangs that the supervisor does not see.

The supervisor knows which rank is late and acts first. If it has died, is frozen or cannot reach the run
folder, every rank dumps its stacks to its log and exits, which frees the GPUs and lets the launcher restart
the ranks.
"""

import contextlib
import faulthandler
import threading
import time
from types import TracebackType
from typing import Self

from drumline.files import write_text
from drumline.hang_timeout import HangTimeout
from drumline.rank_files import HeartbeatWriter, RankFiles

_LOOK_S = 0.5
_SYNC_S = 1.0
"""Shortest interval between two writes of the heartbeat to the file system."""
_GRACE_S = 30.0
"""Added to the limit so that the supervisor acts first; at most the limit itself."""


class RankWatchdog:
    """Context whose thread watches this rank's heartbeats and syncs them to the file system.

    The Python thread re-arms faulthandler's C timer at every new heartbeat. The timer needs no GIL, so it
    also ends a rank that is stuck in C code while holding the GIL.
    """

    def __init__(
        self, heartbeats: HeartbeatWriter, files: RankFiles, hang_timeout: HangTimeout
    ) -> None:
        self._heartbeats, self._files, self._hang_timeout = heartbeats, files, hang_timeout
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="rank-watchdog", daemon=True)

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
        self._heartbeats.sync()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        seen, moved_at, has_reported = None, time.monotonic(), False
        synced_at = float("-inf")
        while True:
            now, heartbeat = time.monotonic(), self._heartbeats.last
            self._hang_timeout.time_steps(now, heartbeat.done)
            limit_s = self._hang_timeout.limit_s(heartbeat)
            grace_s = min(limit_s, _GRACE_S)
            if now - synced_at >= _SYNC_S and self._heartbeats.sync():
                synced_at = now
            if heartbeat != seen:
                seen, moved_at, has_reported = heartbeat, now, False
                faulthandler.dump_traceback_later(limit_s + grace_s, exit=True)
            elif not has_reported and now - moved_at >= limit_s + grace_s / 2:
                has_reported = True
                self._report(now - moved_at)
            if self._over.wait(_LOOK_S):
                return

    def _report(self, seconds: float) -> None:
        """Dump stacks and collectives, unless the supervisor has already asked for them."""
        if self._files.asked().stacks:
            return
        heartbeat = self._heartbeats.last
        print(
            f"not moved for {seconds:.0f} s: step {heartbeat.step}, {heartbeat.words}", flush=True
        )
        faulthandler.dump_traceback(all_threads=True)
        keep_collectives(self._files)


def keep_collectives(files: RankFiles) -> None:
    """Write the contents of torch's flight recorder: NCCL's if there is one, else gloo's."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        from torch._C import _distributed_c10d as c10d

        dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(
            c10d, "_dump_fr_trace_json", None
        )
        if dump and (held := dump()):
            write_text(files.collectives, held.decode(errors="replace"))
