"""Makes a prepared folder visible by one rename, and removes what prepares that were killed have left."""

import contextlib
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from drumline.data.dataset_manifest import not_ours, read_dataset_manifest
from drumline.errors import DataError

_ABANDONED_AFTER_S = 60.0
_JUST_MADE_S = 2.0
"""A process may have made its lock file and not taken the lock yet."""


@contextlib.contextmanager
def hidden_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, for one process; what is still in it at the end is deleted.

    A signal that comes while it is made deletes it, too, because its name stands before it does.
    """
    folder = final.parent / f".{final.name}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context that holds the temporary folder's lock; it is also released if the process dies."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(temporary: Path, final: Path) -> None:
    """Publish the folder by one rename; rows that another process published first are kept."""
    (temporary / ".lock").unlink()
    try:
        temporary.rename(final)
    except OSError:
        if read_dataset_manifest(final) is None:
            shutil.rmtree(final, ignore_errors=True)
            try:
                temporary.rename(final)
            except OSError:
                raise DataError(not_ours(final)) from None


def remove_abandoned(final: Path) -> None:
    """Delete temporary folders whose process has ended: their lock is free, or was never made."""
    for folder in final.parent.glob(".*.*"):
        with contextlib.suppress(OSError):
            age_s = time.time() - folder.stat().st_mtime
            if age_s < (_JUST_MADE_S if (folder / ".lock").exists() else _ABANDONED_AFTER_S):
                continue
            with contextlib.suppress(FileNotFoundError), (folder / ".lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
