"""Files in an attempt's log folder by which ranks and supervisor communicate.

rank-0.pid            the process identity; written first
rank-0.heartbeat      the rank's phase and progress, in one line that is overwritten in place
rank-0.device.json    host, device, compute threads, and versions of torch, CUDA, NCCL and cuDNN
rank-0.begun.json     which checkpoint was loaded, and which were set aside
rank-0.started.json   seconds that each phase before the first step took
rank-0.outcome.json   how the rank ended; a launcher's exit code does not say it reliably
rank-0.log            everything the rank printed
rank-0.collectives.json  after a hang: its last collectives, from torch's flight recorder
ended                 from the supervisor: ranks on other hosts, and ranks that start later, exit at once
stop, stacks          from the supervisor, for ranks on other hosts, which get no signals: finish the step and
                      exit; dump the stacks
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
"""Reserved on disk when a rank starts, so that its outcome can be written even if the disk is full."""
_READS = 5


@dataclass(frozen=True)
class Heartbeat:
    """A rank's progress.

    `count` grows with every phase that the rank enters; it is comparable between ranks, because all enter the
    same phases in the same order. `waits` grows while a rank that is not stuck waits within a phase, for
    example for a disk. `done` is the number of finished steps; `busy_ms` the total time in forwards, where no
    rank waits for another; `limit_s` how long this phase may take, in seconds (0: the rank does not know).
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
        """The phase as readable text: `forward of micro-batch 1 of 2`."""
        return f"{self.phase} of {self.detail}" if self.detail else str(self.phase)


class Asked(NamedTuple):
    """The supervisor's requests to all ranks by file: exit at once, stop after the step, dump stacks."""

    ended: bool
    stop: bool
    stacks: bool


class RankFiles:
    """The files of one rank in one attempt."""

    def __init__(self, logs: Path, rank: int) -> None:
        self.rank, self.folder = rank, logs
        self.log = logs / f"rank-{rank}.log"
        self.collectives = logs / f"rank-{rank}.collectives.json"
        self._pid = logs / f"rank-{rank}.pid"
        self._heartbeat = logs / f"rank-{rank}.heartbeat"
        self._outcome = logs / f"rank-{rank}.outcome.json"
        self._begun = logs / f"rank-{rank}.begun.json"
        self._started = logs / f"rank-{rank}.started.json"
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
        """The rank's latest heartbeat; None before the first, or if no consistent read succeeds."""
        try:
            descriptor = os.open(self._heartbeat, os.O_RDONLY)
        except OSError:
            return None
        try:
            raw = os.pread(descriptor, _HEARTBEAT_BYTES, 0)
            for _ in range(_READS):  # the rank may be writing: read until two reads agree
                before, raw = raw, os.pread(descriptor, _HEARTBEAT_BYTES, 0)
                if raw == before:
                    return _heartbeat_of(raw)
        except OSError:
            pass
        finally:
            os.close(descriptor)
        return None

    def outcome(self) -> dict[str, Any] | None:
        """How the rank ended; None before it has written that."""
        return _object(self._outcome)

    def begun(self) -> dict[str, Any] | None:
        """What the rank loaded (from_step, checkpoint, set_aside); None if it has loaded no checkpoint."""
        return _object(self._begun)

    def device(self) -> dict[str, Any] | None:
        """Host, device, threads and library versions; None before the rank has written them."""
        return _object(self._device)

    def announced_at(self) -> float | None:
        """When the rank announced itself, in seconds since 1970; None before."""
        try:
            return self._pid.stat().st_mtime
        except OSError:
            return None

    def started(self) -> dict[str, Any] | None:
        """Seconds of each phase before the first step, by the phase's name; None before that step."""
        return _object(self._started)

    def write_started(self, seconds: dict[str, float]) -> None:
        """In the rank: write how long each phase before the first step took."""
        with contextlib.suppress(OSError):
            write_json(self._started, seconds)

    def end_attempt(self) -> None:
        """Make ranks that start from now on, and ranks on other hosts, exit."""
        if not self._ended.exists():  # keep its first modification time
            with contextlib.suppress(OSError):  # without the folder no rank can start either
                self._ended.touch()

    def ask_to_stop(self) -> None:
        """Ask ranks on other hosts to finish the step and exit, as a stop signal does on this host."""
        with contextlib.suppress(OSError):
            self._stop.touch()

    def ask_for_stacks(self) -> None:
        """Ask every rank for its last collectives, and ranks on other hosts also for their stacks."""
        with contextlib.suppress(OSError):
            self._stacks.touch()

    def asked(self) -> Asked:
        """In the rank: read the supervisor's requests."""
        return Asked(self._ended.exists(), self._stop.exists(), self._stacks.exists())

    def announce(self) -> bool:
        """In the rank: write its process and reserve its outcome file; False if the attempt has ended."""
        self._pid.write_text(str(Process.current()))
        self._reserved().write_bytes(b" " * _OUTCOME_BYTES)
        return not self._ended.exists()

    def open_heartbeat(self) -> "HeartbeatWriter":
        """In the rank: open the writer of its heartbeats."""
        return HeartbeatWriter(self._heartbeat)

    def write_begun(self, facts: dict[str, Any]) -> None:
        """In the rank: write what it loaded."""
        with contextlib.suppress(OSError):
            write_json(self._begun, facts)

    def write_device(self, facts: dict[str, Any]) -> None:
        """In the rank: write what device it trains on."""
        with contextlib.suppress(OSError):
            write_json(self._device, facts)

    def write_outcome(self, outcome: dict[str, Any]) -> None:
        """In the rank: write the outcome to the reserved file and rename it, so it is complete or absent."""
        raw = json.dumps(outcome).encode()
        reserved = self._reserved()
        with reserved.open("r+b" if reserved.exists() else "wb") as file:
            file.write(raw.ljust(_OUTCOME_BYTES))
            file.truncate(max(len(raw), _OUTCOME_BYTES))
        reserved.replace(self._outcome)

    def _reserved(self) -> Path:
        return self._outcome.with_suffix(".part")


class HeartbeatWriter:
    """Writes the rank's heartbeat to a small memory-mapped file.

    The training thread only copies bytes into the mapping, without a system call. Processes on the same host
    see them at once, even after this one was killed. `sync` flushes them to a shared file system for a
    supervisor on another host; call it from another thread, since it blocks. If the file cannot be created or
    mapped (for example on a full disk), heartbeats stay in memory and the rank continues.
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
        """Report that the rank has entered a phase."""
        self._store(replace(heartbeat, count=self.last.count + 1, waits=self.last.waits))

    def wait(self) -> None:
        """Report that the rank is still waiting in the same phase and is not stuck."""
        self._store(replace(self.last, waits=self.last.waits + 1))

    def sync(self) -> bool:
        """Flush a new heartbeat to the file system; False if there was none."""
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
    """Encode as one line of JSON, padded to a fixed length; a detail that does not fit is dropped."""
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
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
