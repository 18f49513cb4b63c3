"""metrics.jsonl: one JSON object per line, of three kinds; one step line per step, and no partial lines.

    {"kind": "step", "step": 12, "loss": …}            every optimizer step, in order
    {"kind": "evaluation", "step": 12, "eval/loss": …}  after the line of its step
    {"kind": "event", "step": 12, "checkpoint/saved": …}  such as a save; may come after later steps

Files written before the `kind` field existed can be read too; see `with_kind`.
"""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from drumline.errors import RunError
from drumline.files import free_name, open_regular, parse_json, without_undefined

_BLOCK = 1 << 16
_LONGEST_LINE = 4 << 20
_LARGEST_NUMBER = 1e100

Line = dict[str, Any]


class Kind(StrEnum):
    """Kind of a line of metrics.jsonl."""

    STEP = "step"
    EVALUATION = "evaluation"
    EVENT = "event"


class MetricsFile:
    """Appends lines, which are held in memory until `flush`.

    A line that cannot be written stays in memory and is written later; the file never holds a partial line.
    Opening it for a resumed run first drops the lines after the checkpoint's step.
    """

    def __init__(self, path: Path, resume_at: int, evaluation_due: bool = False) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._has_warned = False
        _keep_what_is_not_understood(path)
        self._descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        cut_after(path, resume_at, evaluation_due)
        self._size = os.fstat(self._descriptor).st_size

    def add(self, kind: Kind, **values: Any) -> None:
        """Append one line; non-finite numbers become null."""
        plain = {"kind": kind, **without_undefined(values)}
        line = json.dumps(plain)
        with self._lock:
            self._waiting.append(line)

    def flush(self) -> None:
        """Write the lines held so far; an error is reported once and the lines stay in memory."""
        try:
            self._write()
        except OSError as error:
            if not self._has_warned:
                print(f"{self._path}: {error.strerror}; its lines are kept in memory", flush=True)
            self._has_warned = True

    def sync(self) -> None:
        """Write the lines held so far and fsync; OSError if that fails."""
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


def _keep_what_is_not_understood(path: Path) -> None:
    """Move a file aside that ends in lines which are no metrics lines: cutting it would delete them.

    One such line at the end is a torn one, as a killed process leaves it.
    """
    bad = 0
    for _, line in lines_from_end(path):
        if line is not None:
            break
        bad += 1
    if bad <= 2:  # a torn line, and what follows the last line break
        return
    aside = free_name(path, "before")
    path.rename(aside)
    print(f"{path}: its end is no metrics file; kept as {aside.name}", flush=True)


def missing_steps(path: Path, before: int = 0) -> int:
    """How many steps before the last one have no line; `before`: those that another run made."""
    steps = [line["step"] for line in iterate_metrics(path) if line["kind"] == Kind.STEP]
    return max(steps, default=before) - before - len(set(steps))


def iterate_metrics(path: Path) -> Iterator[Line]:
    """Yield every complete line in file order; a torn last line is left out."""
    if not os.path.lexists(path):
        return
    with os.fdopen(open_regular(path), "rb") as file:
        while raw := file.readline(_LONGEST_LINE):
            if len(raw) == _LONGEST_LINE:
                raise _too_long(path)
            line = parsed_line(raw)
            if line is not None:
                yield line


def read_metrics(path: Path) -> list[Line]:
    """Read all complete lines into a list, for commands that need them at once."""
    return list(iterate_metrics(path))


def last_line(path: Path, is_meant: Callable[[Line], bool]) -> Line | None:
    """The last complete line for which `is_meant` is true, reading from the end; None if there is none."""
    for _, line in lines_from_end(path):
        if line is not None and is_meant(line):
            return line
    return None


def last_step_line(path: Path) -> Line | None:
    """The last step line; None if there is none."""
    return last_line(path, lambda line: line["kind"] == Kind.STEP)


def is_torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            return file.read() not in (b"", b"\n")
    except OSError:
        return False


def parsed_line(raw: bytes) -> Line | None:
    """Parse a line of metrics and add its kind; None if it is torn or not a metrics line."""
    try:
        line = parse_json(raw)
    except ValueError:
        return None
    return with_kind(line) if isinstance(line, dict) and _is_line(line) else None


def count_bad_lines(path: Path) -> int:
    """How many lines are no metrics lines, a torn last one left aside."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return 0
    with os.fdopen(descriptor, "rb") as file:
        return sum(raw.endswith(b"\n") and parsed_line(raw) is None for raw in file)


_NUMBERS = ("loss", "lr", "grad_norm", "samples", "weight", "seconds", "samples_per_s", "tokens_per_s", "mfu",
            "peak_allocated", "peak_reserved", "epoch")  # fmt: skip


def _is_line(line: Line) -> bool:
    """Whether the fields that other code computes with have their types."""
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return False
    if line.get("kind", Kind.STEP) not in list(Kind) or not isinstance(line.get("digest", ""), str):
        return False
    kind = line.get("kind", Kind.STEP if "lr" in line else None)
    if kind == Kind.STEP and not {"loss", "lr"} <= line.keys():
        return False
    names = [
        *_NUMBERS,
        *(name for name in line if name.startswith(("eval/", "loss/", "checkpoint/saved"))),
    ]
    values = [line[name] for name in names if line.get(name) is not None]
    return all(_is_number(value) for value in values)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < _LARGEST_NUMBER
    )


def _too_long(path: Path) -> RunError:
    return RunError(
        f"{path}: a line of more than {_LONGEST_LINE >> 20} MiB; it is not a metrics file"
    )


def with_kind(line: Line) -> Line:
    """Return the line with a `kind`; for older files it is derived from the other fields."""
    if "kind" in line:
        return line
    if "lr" in line:
        return {"kind": Kind.STEP, **line}
    return {"kind": Kind.EVALUATION if "eval/loss" in line else Kind.EVENT, **line}


def cut_after(path: Path, step: int, evaluation_due: bool) -> None:
    """Drop the lines of steps after the checkpoint that the run resumes from, and a torn last line.

    `evaluation_due`: the evaluation of `step` itself will be repeated, so its line is dropped too. Only the
    end of the file is read and written, from the last kept step line on, so memory and time do not grow with
    the run. The kept lines are written before the file is truncated, so a kill in between loses none.
    """

    def is_kept(line: Line) -> bool:
        again = evaluation_due and line["step"] == step and line["kind"] == Kind.EVALUATION
        return bool(line["step"] <= step and not again)

    kept: list[bytes] = []
    start = 0
    for offset, line in lines_from_end(path):
        if line is not None and line["kind"] == Kind.STEP and line["step"] <= step:
            start = offset
            kept.append(_encoded(line))
            break
        if line is not None and is_kept(line):
            kept.append(_encoded(line))
    raw = b"".join(reversed(kept))
    with path.open("r+b") as file:
        file.seek(start)
        if file.read(len(raw) + 1) == raw:
            return
        file.seek(start)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
        file.truncate(start + len(raw))
        os.fsync(file.fileno())


def _encoded(line: Line) -> bytes:
    return (json.dumps(line) + "\n").encode()


def lines_from_end(path: Path) -> Iterator[tuple[int, Line | None]]:
    """Yield (byte offset, line) from the last line to the first; the line is None if torn or empty."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at > 0:
            size = min(at, _BLOCK)
            at = file.seek(at - size)
            block = file.read(size) + rest
            if len(block) > _LONGEST_LINE:
                raise _too_long(path)
            first, *lines = block.split(b"\n")
            starts, end = [], at + len(first) + 1
            for raw in lines:
                starts.append(end)
                end += len(raw) + 1
            for start, raw in zip(reversed(starts), reversed(lines), strict=True):
                yield start, parsed_line(raw)
            rest = first
        yield 0, parsed_line(rest)
