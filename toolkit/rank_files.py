"""What a rank leaves in its attempt's log folder for the supervisor to read.

rank-0.pid            the process; written first
rank-0.beat           a count that grows at every place of the loop, the step, time in forwards, the place
rank-0.device.json    the device that it trains on, and what drives it
rank-0.begun.json     which checkpoint was loaded, and which were set aside
rank-0.outcome.json   how it ended; a launcher's exit code does not tell
rank-0.log            everything it printed
rank-0.collectives.json  after a hang: its last collectives, as torch's flight recorder has them
ended                 written by the supervisor: a rank that is there or starts after this leaves at once
stop, stacks          the same, for ranks that no signal reaches: finish the step and leave; tell the stacks
"""

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import write_json
from toolkit.processes import Process

_BEAT_BYTES = 120
_OUTCOME_BYTES = 1 << 14
"""Reserved on disk when a rank starts, so that a full disk cannot silence how it ended."""


@dataclass(frozen=True)
class Beat:
    """Where a rank is: `count` is comparable between ranks, which all pass the same places.

    `waits` counts signs of life at one place; `done` the steps that are finished; `busy_ms` the time spent
    in forwards, where no rank waits for another.
    """

    count: int
    waits: int
    done: int
    step: int
    busy_ms: int
    place: str


class Asked(NamedTuple):
    """What a supervisor asks of all ranks by files: to be gone, to stop, to tell their stacks."""

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
        self._beat = logs / f"rank-{rank}.beat"
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

    def beat(self) -> Beat | None:
        """The last place that the rank came to."""
        *numbers, place = _text(self._beat).strip().split(" ", 5)
        if len(numbers) != 5 or not all(number.isdigit() for number in numbers):
            return None
        count, waits, done, step, busy_ms = map(int, numbers)
        return Beat(count, waits, done, step, busy_ms, place)

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

    def open_beat(self) -> "BeatWriter":
        """In the rank: the writer of its beats."""
        return BeatWriter(self._beat)

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


class BeatWriter:
    """Overwrites one small line in place; a full disk does not stop it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.last = Beat(count=0, waits=0, done=0, step=0, busy_ms=0, place="start")

    def __call__(self, done: int, step: int, place: str, busy_ms: int = 0) -> None:
        """The rank has come to `place` in `step`, has finished `done` steps, was busy for so long."""
        self._write(Beat(self.last.count + 1, self.last.waits, done, step, busy_ms, place))

    def wait(self) -> None:
        """The rank is where it was, and lives."""
        self._write(replace(self.last, waits=self.last.waits + 1))

    def _write(self, beat: Beat) -> None:
        self.last = beat
        numbers = f"{beat.count} {beat.waits} {beat.done} {beat.step} {beat.busy_ms}"
        line = f"{numbers} {beat.place}".encode()[:_BEAT_BYTES].ljust(_BEAT_BYTES)
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, line, 0)


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
