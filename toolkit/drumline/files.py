"""Atomic file replacement: write a temporary file in the same folder, fsync it, rename it."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any


def write_durably(path: Path, raw: bytes) -> None:
    """Replace a file's content atomically: a reader, even after a power cut, sees the old or the new one.

    On failure, removes the temporary file and raises OSError with the file's name.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
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
