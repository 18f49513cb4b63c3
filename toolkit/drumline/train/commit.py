"""Commits a checkpoint over all ranks through torch's key-value store, without a collective or the disk.

Each rank reports once per save from its saving thread, so training goes on meanwhile. Rank 0 decides as soon
as all are ready or one has failed, and every rank reads the same verdict.
"""

import math
import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

_POLL_S = (0.002, 0.05)
_READY, _FAILED = b"+", b"-"

Limit = Callable[[int], float]
"""From the bytes of the largest rank's part to the seconds that writing it may take."""


class SaveCommit:
    """One rank's view of the commit; `name`, unique to the attempt, and the step identify a save."""

    def __init__(self, store: Store, name: str, rank: int, ranks: int) -> None:
        self._store, self._name, self._rank, self._ranks = store, name, rank, ranks

    def begin(self, step: int, size: int) -> None:
        """Report that this rank starts to write `size` bytes."""
        self._set(step, f"{self._rank}/bytes", str(size).encode())

    def ready(self, step: int, digest: str) -> None:
        """Report that this rank's part is on disk; `digest` is the SHA-256 of its manifest."""
        self._set(step, str(self._rank), _READY + digest.encode())

    def fail(self, step: int, error: str) -> None:
        """Report why this rank's part is not on disk."""
        self._set(step, str(self._rank), _FAILED + error.encode())

    def collect(self, step: int, limit_s: Limit) -> tuple[list[str], str]:
        """On rank 0: wait for the digests of all ranks, or the error of the first that failed or was late."""
        digests: dict[int, str] = {}

        def all_are_in() -> bool:
            for rank in range(self._ranks):
                if rank not in digests and self._has(step, str(rank)):
                    report = self._get(step, str(rank))
                    if report[:1] == _FAILED:
                        raise _Failed(report[1:].decode(errors="replace"))
                    digests[rank] = report[1:].decode()
            return len(digests) == self._ranks

        try:
            timeout_s = limit_s(self._largest(step))
            if not self._wait(all_are_in, timeout_s):
                late = sorted(set(range(self._ranks)) - set(digests))
                return [], f"rank {late} did not write its part within {timeout_s:,.0f} s"
        except _Failed as error:
            return [], str(error)
        return [digests[rank] for rank in range(self._ranks)], ""

    def decide(self, step: int, error: str) -> None:
        """On rank 0: tell all ranks that the save is published (`error` is ""), or why it is not."""
        self._set(step, "verdict", error.encode() or _READY)

    def verdict(self, step: int) -> str:
        """On other ranks: wait for rank 0; returns why the save failed, or "" when it is published.

        Has no timeout, because only rank 0 decides; RuntimeError once the store's process has ended.
        """
        self._wait(lambda: self._has(step, "verdict"), math.inf)
        found = self._get(step, "verdict")
        return "" if found == _READY else found.decode(errors="replace")

    def _largest(self, step: int) -> int:
        """Bytes of the largest part, of the ranks that have begun to write."""
        begun = (f"{rank}/bytes" for rank in range(self._ranks))
        return max((int(self._get(step, key)) for key in begun if self._has(step, key)), default=0)

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        deadline, pause = time.monotonic() + timeout_s, _POLL_S[0]
        while not ready():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
        return True

    def _key(self, step: int, what: str) -> str:
        return f"drumline/save/{self._name}/{step}/{what}"

    def _has(self, step: int, what: str) -> bool:
        return bool(self._store.check([self._key(step, what)]))

    def _get(self, step: int, what: str) -> bytes:
        return bytes(self._store.get(self._key(step, what)))

    def _set(self, step: int, what: str, value: bytes) -> None:
        self._store.set(self._key(step, what), value)  # type: ignore[arg-type]


class _Failed(Exception):
    """A rank has reported that it failed."""
