"""Files that are whole at any moment: written beside, fsynced, renamed."""

import json
import os
from pathlib import Path
from typing import Any


def write_durably(path: Path, raw: bytes) -> None:
    """Replace a file's content; a reader, also after a power cut, sees the old or the new."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
