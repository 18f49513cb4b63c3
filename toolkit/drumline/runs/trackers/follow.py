"""The process of one tracker: follows metrics.jsonl and sends each line to the tracker.

    python -m drumline.runs.trackers.follow wandb RUN_FOLDER

`trackers/<name>.sent` lists the lines sent, so that after a resume a line is sent again only if its loss
differs. Once `trackers/<name>.over` exists, the run has ended: the process sends the rest and exits. It
ignores stop signals, which are meant for the ranks.
"""

import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from drumline.metrics_file import parsed_line
from drumline.processes import STOP_SIGNALS, Process
from drumline.runs.folder import RunFolder
from drumline.runs.trackers import over_file

_POLL_S = 0.5

TRACKERS = {
    "wandb": "drumline.runs.trackers.wandb:WandbTracker",
    "tensorboard": "drumline.runs.trackers.tensorboard:TensorboardTracker",
}


class Tracker(Protocol):
    """Interface of a tracker; an exception in it ends only this process."""

    def __init__(self, folder: RunFolder) -> None: ...

    def log(self, line: dict[str, Any]) -> None:
        """Send one line of metrics.jsonl."""

    def finish(self, record: dict[str, Any]) -> None:
        """Send the final record and close; the run has ended."""


class MetricsTail:
    """Reads new lines of metrics.jsonl, even after a resume has truncated and rewritten it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Complete lines since the last call; all lines again if the file was replaced or shortened."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                raw = file.read()
        except OSError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for text in whole.split(b"\n") if (line := parsed_line(text))]


class Sent:
    """The lines sent so far, by step, kind and loss."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, str] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            rows = (row.split(" ", 1) for row in text.split("\n"))
            self._known = {_key(row[0]): row[1] for row in rows if len(row) == 2}
        self._file = path.open("a", encoding="utf-8")

    def is_new(self, line: dict[str, Any]) -> bool:
        """Whether the line has not been sent with this loss; marks it as sent."""
        key, value = f"{line['kind']}-{line['step']}", repr(line.get("loss", line.get("eval/loss")))
        if self._known.get(key) == value:
            return False
        self._known[key] = value
        self._file.write(f"{key} {value}\n")
        return True

    def flush(self) -> None:
        """Flush the list to its file."""
        self._file.flush()


def _key(text: str) -> str:
    """Convert a key written before lines had a kind."""
    return text.replace("eval-", "evaluation-") if text.startswith("eval-") else text


def follow(name: str, folder: RunFolder) -> None:
    """Follow the metrics until the run has ended or its supervisor is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    supervisor = Process.parse(os.environ.get("DRUMLINE_SUPERVISOR", ""))
    place = folder.path / "trackers"
    heartbeat = place / f"{name}.heartbeat"
    tail, sent = MetricsTail(folder.metrics_file), Sent(place / f"{name}.sent")
    module, _, kind = TRACKERS[name].partition(":")
    tracker: Tracker = getattr(import_module(module), kind)(folder)
    while True:
        is_last = over_file(heartbeat).exists() or (
            supervisor is not None and not supervisor.is_alive
        )
        for line in tail.new_lines():
            if sent.is_new(line):
                tracker.log(line)
        sent.flush()
        heartbeat.touch()
        if is_last:
            break
        time.sleep(_POLL_S)
    tracker.finish(folder.read_record())


def main() -> int:
    """Run one tracker; an error becomes the last line of its log, and exit code 1."""
    name, path = sys.argv[1:]
    try:
        follow(name, RunFolder(Path(path)))
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {first[0]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
