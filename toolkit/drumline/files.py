"""Atomic file replacement, and reading of files that somebody else may have placed.

Replacement writes a temporary file in the same folder, fsyncs it, and renames it. Reading follows no symbolic
link, opens regular files only, and stops at a size and depth limit.
"""

import contextlib
import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

RECORD_LIMIT = 64 << 20
"""Bytes of the largest JSON file that a run folder holds; a record with its code has at most a few MiB."""
_DEEPEST = 100


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file without waiting for a pipe and, unless `follow`, without following a link.

    Returns the descriptor. OSError names the path and says what it is, if it is something else.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP, "is a symbolic link, which is not followed", str(path)
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_bytes(path: Path, limit: int = RECORD_LIMIT, *, follow: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes; OSError otherwise. `follow`: also through a link."""
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            words = f"has {size:,} bytes, at most {limit:,} are read"
            raise OSError(errno.EFBIG, words, str(path))
        return file.read(limit)


def read_json(path: Path, limit: int = RECORD_LIMIT) -> Any:
    """Read a JSON file; OSError as `read_bytes`, ValueError if it is not JSON or nested too deeply."""
    return parse_json(read_bytes(path, limit))


def parse_json(raw: bytes | str) -> Any:
    """Parse JSON text; ValueError if it is not UTF-8, not JSON, or nested more than 100 levels deep."""
    try:
        found = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    waiting = [(found, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        if isinstance(value, dict):
            waiting += [
                (item, depth + 1) for item in value.values() if isinstance(item, dict | list)
            ]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value if isinstance(item, dict | list)]
    return found


def write_durably(path: Path, raw: bytes) -> None:
    """Replace a file's content atomically: a reader, even after a power cut, sees the old or the new one.

    On failure, removes the temporary file and raises OSError with the file's name.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(open_regular(temporary, flags), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_durably`."""
    write_durably(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with `write_durably`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_folder(path: Path) -> None:
    """Fsync a folder, so that renames and new files in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ForgivingOutput(io.TextIOBase):
    """Unbuffered text output to a file descriptor; text that cannot be written is dropped.

    A closed pipe (`| head`), a closed terminal or a full disk must not end a training.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """Write the text and ignore OSError."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)
