"""What a rank leaves in its attempt's log folder for the supervisor to read.

rank-0.pid            the process; written first
rank-0.heartbeat      where the rank is, in one line that is overwritten in place
rank-0.device.json    the device that it trains on, and what drives it
rank-0.begun.json     which checkpoint was loaded, and which were set aside
rank-0.outcome.json   how it ended; a launcher's exit code does not tell
rank-0.log            everything it printed
rank-0.collectives.json  after a hang: its last collectives, as torch's flight recorder has them
ended                 written by the supervisor: a rank that is there or starts after this leaves at once
stop, stacks          the same, for ranks that no signal reaches: finish the step and leave; dump the stacks
"""

import contextlib
import json
import mmap
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from drumline.files import write_json
from drumline.phases import Phase
from drumline.processes import Process

_HEARTBEAT_BYTES = 256
_OUTCOME_BYTES = 1 << 14
"""Reserved on disk when a rank starts, so that a full disk cannot hide how it ended."""
_READS = 5


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is.

    `count` grows with every phase that the rank enters and is comparable between ranks, which all enter the
    same ones in the same order. `waits` grows while a rank waits in one phase, for a disk say, and lives.
    `done` is the steps that are finished; `busy_ms` the time spent in forwards, where no rank waits for
    another; `limit_s` how long this phase may take, where the rank knows (0: it does not).
    """

    count: int = 0
    waits: int = 0
    done: int = 0
    step: int = 0
    busy_ms: int = 0
    limit_s: float = 0.0
    phase: Phase = Phase.STARTING
    detail: str = ""

    @property
    def words(self) -> str:
        """The phase for people: `forward of micro-batch 1 of 2`."""
        return f"{self.phase} of {self.detail}" if self.detail else str(self.phase)


class Asked(NamedTuple):
    """What a supervisor asks of all ranks by files: to be gone, to stop, to dump their stacks."""

    ended: bool
    stop: bool
    stacks: bool


class RankFiles:
    """The files of one rank in one attempt."""

    def __init__(self, logs: Path, rank: int) -> None:
        self.rank = rank
        self.log = logs / f"rank-{rank}.log"
        self.collectives = logs / f"rank-{rank}.collectives.json"
        self._pid = logs / f"rank-{rank}.pid"
        self._heartbeat = logs / f"rank-{rank}.heartbeat"
        self._outcome = logs / f"rank-{rank}.outcome.json"
        self._begun = logs / f"rank-{rank}.begun.json"
        self._device = logs / f"rank-{rank}.device.json"
        self._ended = logs / "ended"
        self._stop, self._stacks = logs / "stop", logs / "stacks"
        self._process: Process | None = None

    def process(self) -> Process | None:
        """The rank's process, once it has started."""
        if self._process is None:
            self._process = Process.parse(_text(self._pid))
        return self._process

    def heartbeat(self) -> Heartbeat | None:
        """Where the rank is now; None as long as it has not said."""
        try:
            descriptor = os.open(self._heartbeat, os.O_RDONLY)
        except OSError:
            return None
        try:
            raw = os.pread(descriptor, _HEARTBEAT_BYTES, 0)
            for _ in range(_READS):  # the rank may be writing: until two reads are the same
                before, raw = raw, os.pread(descriptor, _HEARTBEAT_BYTES, 0)
                if raw == before:
                    return _heartbeat_of(raw)
        except OSError:
            pass
        finally:
            os.close(descriptor)
        return None

    def outcome(self) -> dict[str, Any] | None:
        """How the rank ended; None as long as it has not said."""
        return _object(self._outcome)

    def begun(self) -> dict[str, Any] | None:
        """What the rank has loaded: from_step, checkpoint, set_aside; None as long as it has not."""
        return _object(self._begun)

    def device(self) -> dict[str, Any] | None:
        """Host, device, and the versions below torch; None as long as it has not said."""
        return _object(self._device)

    def end_attempt(self) -> None:
        """Turn away ranks that come up from now on."""
        if not self._ended.exists():  # its time is when that was first said
            with contextlib.suppress(OSError):  # a folder that is gone turns them away too
                self._ended.touch()

    def ask_to_stop(self) -> None:
        """Of all ranks of the attempt: what a signal asks of those on this host."""
        with contextlib.suppress(OSError):
            self._stop.touch()

    def ask_for_stacks(self) -> None:
        """Of all ranks of the attempt, into their logs."""
        with contextlib.suppress(OSError):
            self._stacks.touch()

    def asked(self) -> Asked:
        """In the rank: what the supervisor wants of all ranks."""
        return Asked(self._ended.exists(), self._stop.exists(), self._stacks.exists())

    def announce(self) -> bool:
        """In the rank: say who it is and reserve its files; false when the attempt has ended."""
        self._pid.write_text(str(Process.current()))
        self._reserved().write_bytes(b" " * _OUTCOME_BYTES)
        return not self._ended.exists()

    def open_heartbeat(self) -> "HeartbeatWriter":
        """In the rank: the writer of its heartbeats."""
        return HeartbeatWriter(self._heartbeat)

    def write_begun(self, facts: dict[str, Any]) -> None:
        """In the rank: what it has loaded."""
        with contextlib.suppress(OSError):
            write_json(self._begun, facts)

    def write_device(self, facts: dict[str, Any]) -> None:
        """In the rank: what it trains on."""
        with contextlib.suppress(OSError):
            write_json(self._device, facts)

    def write_outcome(self, outcome: dict[str, Any]) -> None:
        """In the rank: into the reserved space, then renamed, so that it is whole or absent."""
        raw = json.dumps(outcome).encode()
        reserved = self._reserved()
        with reserved.open("r+b" if reserved.exists() else "wb") as file:
            file.write(raw.ljust(_OUTCOME_BYTES))
            file.truncate(max(len(raw), _OUTCOME_BYTES))
        reserved.replace(self._outcome)

    def _reserved(self) -> Path:
        return self._outcome.with_suffix(".part")


class HeartbeatWriter:
    """The rank's heartbeat, in a small file that is mapped into memory.

    The training thread only copies some bytes into that memory: no system call, however often it reports.
    Processes on the same host see them at once, also after this one was killed; `sync` sends them to a shared
    file system, for a supervisor on another host, and belongs in another thread. Where the file cannot be
    made or mapped (a full disk), heartbeats stay in memory and the rank goes on.
    """

    def __init__(self, path: Path) -> None:
        self.last = Heartbeat()
        self._synced = self.last
        self._map: mmap.mmap | None = None
        with contextlib.suppress(OSError, ValueError), path.open("w+b") as file:
            file.write(_line_of(self.last))
            file.flush()
            self._map = mmap.mmap(file.fileno(), _HEARTBEAT_BYTES)

    def enter(self, heartbeat: Heartbeat) -> None:
        """The rank has entered a phase."""
        self._store(replace(heartbeat, count=self.last.count + 1, waits=self.last.waits))

    def wait(self) -> None:
        """The rank is where it was, and lives."""
        self._store(replace(self.last, waits=self.last.waits + 1))

    def sync(self) -> bool:
        """Send what is new to the file system; False where nothing was."""
        last = self.last
        if last is self._synced or self._map is None:
            return False
        self._synced = last
        with contextlib.suppress(OSError):
            self._map.flush()
        return True

    def _store(self, heartbeat: Heartbeat) -> None:
        self.last = heartbeat
        if self._map is not None:
            self._map[:] = _line_of(heartbeat)


def _line_of(heartbeat: Heartbeat) -> bytes:
    """One line of JSON, padded to its fixed length; a long detail is cut short."""
    plain = asdict(heartbeat)
    raw = json.dumps(plain).encode()
    if len(raw) > _HEARTBEAT_BYTES:
        raw = json.dumps({**plain, "detail": ""}).encode()
    return raw.ljust(_HEARTBEAT_BYTES)


def _heartbeat_of(raw: bytes) -> Heartbeat | None:
    try:
        plain = json.loads(raw)
        return Heartbeat(**{**plain, "phase": Phase(plain["phase"])})
    except (ValueError, TypeError, KeyError):
        return None


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
