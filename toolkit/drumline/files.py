"""Atomic file replacement, and reading of files that somebody else may have placed.

Replacement writes a temporary file in the same folder, fsyncs it, and renames it. Reading follows no symbolic
link, opens regular files only, and stops at a size and depth limit.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD_LIMIT = 64 << 20
"""Bytes of the largest JSON file that a run folder holds; a record with its code has at most a few MiB."""
_DEEPEST = 100
_LONGEST_STEM = 200
"""A name has at most 255 bytes, and a temporary folder's name has some around its target's."""


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
    status = os.fstat(descriptor)
    is_written = bool(flags & (os.O_WRONLY | os.O_RDWR))
    if not stat.S_ISREG(status.st_mode) or (is_written and status.st_nlink > 1):
        os.close(descriptor)
        what = (
            "has a hard link elsewhere" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        )
        raise OSError(errno.EINVAL, what, str(path))
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


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes | str) -> Any:
    """Parse JSON text; ValueError if it is not UTF-8, not JSON (NaN is not), or over 100 levels deep."""
    try:
        found = json.loads(raw, parse_constant=_refuse_constant)
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


def without_undefined(plain: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(plain, dict):
        return {key: without_undefined(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [without_undefined(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def write_durably(path: Path, raw: bytes) -> None:
    """Replace a file's content atomically: a reader, even after a power cut, sees the old or the new one.

    On failure, removes the temporary file and raises OSError with the file's name.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link to another file
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
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


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target`, which takes its place if the block succeeds, else is deleted.

    `target` is missing or empty. A folder that a killed process left behind is deleted first. OSError of the
    block, also as the cause of a library's error, names `target`.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_name(f".{target.name[:_LONGEST_STEM]}.part")
    shutil.rmtree(written, ignore_errors=True)
    try:
        written.mkdir()
        yield written
        fsync_folder(written)
        written.rename(target)
    except BaseException as error:
        shutil.rmtree(written, ignore_errors=True)
        if (words := _disk_words(error)) is not None:
            number, text = words
            raise OSError(number, f"{text}; nothing was written", str(target)) from None
        raise


def _disk_words(error: BaseException) -> tuple[int, str] | None:
    """Number and text of a full or failing disk; None for other errors.

    safetensors reports one by its text only.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno, os.strerror(error.errno)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS):
        if f"os error {number}" in str(error):
            return number, os.strerror(number)
    return None


def free_name(path: Path, kind: str) -> Path:
    """The first of `<name>.<kind>-1`, `-2`, … that is free: where a file or folder is kept aside."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{kind}-{number}")):
        number += 1
    return aside


def fsync_folder(path: Path) -> None:
    """Fsync a folder, so that renames and new files in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(path: Path, mode: int) -> None:
    """Give a file or folder the permissions that an ordinary program would: `mode` without the umask's bits.

    For what libraries create for their user alone, such as temporary folders and safetensors files.
    """
    path.chmod(mode & ~_umask())


def _umask() -> int:
    """The process's umask, read without changing it for other threads."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("Umask:"))
    return int(line.split()[1], 8)
