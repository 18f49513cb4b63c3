"""metrics.jsonl: a line for every step; each step stands there once, none in part."""

import errno
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.files import write_text

_BLOCK = 1 << 16


class MetricsFile:
    """Lines are held until `flush`, which comes when the loop logs or saves.

    A line that the disk refuses is held on and written later; none stands there in part.
    """

    def __init__(self, path: Path, resume_at: int, evaluation_due: bool = False) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._told = False
        if path.exists():
            _keep_until(path, resume_at, evaluation_due)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._descriptor).st_size

    def add(self, **values: Any) -> None:
        """One line; numbers that are not finite become null."""
        line = json.dumps({name: _finite(value) for name, value in values.items()})
        with self._lock:
            self._waiting.append(line)

    def flush(self) -> None:
        """Write the lines held so far; an error is told once and the lines are held on."""
        try:
            self._write()
        except OSError as error:
            if not self._told:
                print(f"{self._path}: {error.strerror}; its lines are held", flush=True)
            self._told = True

    def sync(self) -> None:
        """Write the lines held so far and wait for the disk; OSError where it refuses."""
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._descriptor)

    def _write(self) -> None:
        with self._lock:
            raw = "".join(f"{line}\n" for line in self._waiting).encode()
            try:
                if os.write(self._descriptor, raw) < len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(raw)
            self._waiting.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a torn last one is left out."""
    raw = path.read_bytes() if path.exists() else b""
    return [line for text in raw.split(b"\n") if (line := parsed_line(text))]


def last_line(path: Path, is_meant: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The last whole line that is meant, read from the end; None where there is none."""
    try:
        with path.open("rb") as file:
            at, rest = file.seek(0, os.SEEK_END), b""
            while at > 0:
                size = min(at, _BLOCK)
                at = file.seek(at - size)
                first, *lines = (file.read(size) + rest).split(b"\n")
                for raw in reversed(lines if at else [first, *lines]):
                    line = parsed_line(raw)
                    if line is not None and is_meant(line):
                        return line
                rest = first
    except OSError:
        pass
    return None


def is_torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            return file.read() not in (b"", b"\n")
    except OSError:
        return False


def parsed_line(raw: bytes) -> dict[str, Any] | None:
    """A line of metrics; None for one that is torn."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _keep_until(path: Path, step: int, evaluation_due: bool) -> None:
    """Drop lines after the checkpoint that the run resumes from, and a torn last line.

    Also an evaluation of that very step, where it is to be done again.
    """

    def is_kept(line: dict[str, Any]) -> bool:
        again = evaluation_due and line["step"] == step and "eval/loss" in line
        return bool(line["step"] <= step and not again)

    kept = [json.dumps(line) for line in read_metrics(path) if is_kept(line)]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
