"""What the cache holds: prepared data and traces, with their sizes and ages; and how to remove them."""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from drumline.data.cache import cache_root
from drumline.data.dataset_manifest import MANIFEST_FILE, read_dataset_manifest
from drumline.errors import DataError

_DAY_S = 86400.0


@dataclass(frozen=True)
class Entry:
    """A folder of the cache: its bytes, days since it was last written or read, and what it holds."""

    path: Path
    size: int
    age_days: float
    words: str

    @property
    def key(self) -> str:
        """The name by which it is removed."""
        return self.path.name


def entries() -> list[Entry]:
    """All prepared data and traces, the largest first."""
    found = []
    for kind in ("data", "traces"):
        folder = cache_root() / kind
        if folder.is_dir():
            found += [
                _entry(path, kind) for path in folder.iterdir() if not path.name.startswith(".")
            ]
    return sorted(found, key=lambda entry: -entry.size)


def remove(entry: Entry) -> None:
    """Delete a folder of the cache; it disappears at once, under another name, before its files do.

    DataError where this user may not.
    """
    hidden = entry.path.with_name(f".removed-{entry.key}-{os.getpid()}")
    try:
        entry.path.rename(hidden)
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left of it is shown, as damaged
            hidden.rename(entry.path)
        raise DataError(f"{entry.path}: cannot be removed: {error.strerror}") from None


def _entry(path: Path, kind: str) -> Entry:
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    status = {file.name: file.stat() for file in files}
    size = sum(file.stat().st_size for file in files)
    # The manifest is read by this command too, so it does not tell when a run last read the rows.
    used = [one for name, one in status.items() if name != MANIFEST_FILE] or list(status.values())
    last = max((max(one.st_mtime, one.st_atime) for one in used), default=path.stat().st_mtime)
    return Entry(path, size, max(0.0, time.time() - last) / _DAY_S, _words(path, kind))


def _words(path: Path, kind: str) -> str:
    if kind == "traces":
        return "a trace"
    try:
        manifest = read_dataset_manifest(path)
    except DataError:
        return "not readable by this user"
    if manifest is None:
        return "of another version, or damaged"
    return f"{manifest.samples:,} samples of {manifest.origin or manifest.task}"
