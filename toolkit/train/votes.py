"""How the ranks agree whether a checkpoint is written, without a collective and without the disk.

Each rank votes once per save through torch's key-value store, from its saving thread; rank 0
decides as soon as all have voted or one has failed, and every rank learns the same verdict.
"""

import math
import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

_POLL_S = (0.002, 0.05)
_SOUND, _FAILED = b"+", b"-"


class Votes:
    """The votes of one rank; a save is named by `name`, which is the attempt's own, and its step."""

    def __init__(self, store: Store, name: str, rank: int, world: int, timeout_s: float) -> None:
        self._store, self._name, self._rank, self._world = store, name, rank, world
        self._timeout_s = timeout_s

    def cast(self, step: int, digest: str) -> None:
        """This rank's part is on disk; `digest` is that of its manifest."""
        self._set(step, str(self._rank), _SOUND + digest.encode())

    def fail(self, step: int, error: str) -> None:
        """This rank's part is not on disk, and why."""
        self._set(step, str(self._rank), _FAILED + error.encode())

    def collect(self, step: int) -> tuple[list[str], str]:
        """Rank 0: the digests of all ranks, or the error of the first that failed."""
        digests: dict[int, str] = {}

        def all_are_in() -> bool:
            for rank in range(self._world):
                if rank not in digests and self._has(step, str(rank)):
                    vote = self._get(step, str(rank))
                    if vote[:1] == _FAILED:
                        raise _Failed(vote[1:].decode(errors="replace"))
                    digests[rank] = vote[1:].decode()
            return len(digests) == self._world

        try:
            if not self._wait(all_are_in, self._timeout_s):
                late = sorted(set(range(self._world)) - set(digests))
                return [], f"rank {late} did not write its part within {self._timeout_s:g} s"
        except _Failed as error:
            return [], str(error)
        return [digests[rank] for rank in range(self._world)], ""

    def decide(self, step: int, error: str) -> None:
        """Rank 0: published, or why not."""
        self._set(step, "verdict", error.encode() or _SOUND)

    def verdict(self, step: int) -> str:
        """Other ranks: why the save failed; empty when it is published.

        Without a deadline: only rank 0 decides, and where it is gone the store is gone with it.
        """
        self._wait(lambda: self._has(step, "verdict"), math.inf)
        found = self._get(step, "verdict")
        return "" if found == _SOUND else found.decode(errors="replace")

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
    """A rank has voted against."""
