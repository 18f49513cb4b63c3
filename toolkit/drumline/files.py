"""Files that are whole at any moment: written beside, fsynced, renamed."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any


def write_durably(path: Path, raw: bytes) -> None:
    """Replace a file's content; a reader, also after a power cut, sees the old or the new.

    OSError with the file's name; nothing half-written stays.
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
    """`write_durably` of UTF-8 text."""
    write_durably(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_durably` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ForgivingOutput(io.TextIOBase):
    """Text to a descriptor, unbuffered; what nobody takes any more, or no disk, is dropped.

    A reader that leaves (`| head`, a closed terminal) must not end a training.
    """

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """All of it, or what can be written."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)
