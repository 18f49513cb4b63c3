"""Reads a checkpoint's small files and their digests, and tells damage from what says nothing of it."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.files import RECORD_LIMIT, open_regular, parse_json

_NOT_A_FILE = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR, errno.ENOTDIR)
"""What opening something that is not a regular file gives; a checkpoint holds regular files only."""


def sha256(raw: Any) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(raw).hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most `RECORD_LIMIT`; CheckpointError otherwise."""
    descriptor = open_file(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            size = os.fstat(descriptor).st_size
            if size > RECORD_LIMIT:
                raise CheckpointError(f"{path}: it is not what was saved ({size:,} bytes)")
            return file.read()
        except OSError as error:
            raise unreadable(path, error) from None


def open_file(path: Path) -> int:
    """Open a regular file without following a link; CheckpointError for anything else."""
    try:
        return open_regular(path)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error of a file that cannot be read: whether that proves damage, or says nothing of the content.

    Damage: a file that is missing from its checkpoint, or is a link, a pipe or a folder. Anything else, such
    as a permission, an I/O error or a checkpoint folder that is gone (deleted meanwhile, or its mount is),
    can pass, so no checkpoint may be given up for it.
    """
    words = f"{path}: cannot be read: {error.strerror or error}"
    missing = error.errno == errno.ENOENT and path.parent.is_dir()
    if missing or error.errno in _NOT_A_FILE:
        return CheckpointError(words)
    return CheckpointUnreadable(
        f"{words}. That does not say that it is damaged: nothing was renamed. Nearest: make it readable for "
        "this user"
    )


def parse(path: Path, raw: bytes) -> dict[str, Any]:
    """The JSON mapping in a file's bytes; CheckpointError for anything else. `path` is for the message."""
    try:
        found = parse_json(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: it is not what was saved (not JSON)")
    return found


def encode(value: dict[str, Any]) -> bytes:
    """Canonical JSON bytes, so that a file can be compared with its re-encoded content."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def read_listed(path: Path, name: str, digest: str) -> dict[str, Any]:
    """The JSON mapping in a checkpoint's file of this name; CheckpointError where its SHA-256 is another."""
    raw = read_file(path / name)
    if sha256(raw) != digest:
        raise CheckpointError(f"{path / name}: it is not what was saved")
    return parse(path / name, raw)
