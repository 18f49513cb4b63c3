"""Writes, reads and verifies the manifests of a checkpoint.

    checkpoints/step-00000200/
        rank-0.safetensors   the tensors (or parts of them) that rank 0 owns, each as one dimension
        rank-0.json          tensor, global shape, boxes (offsets and sizes; `checkpoint/boxes.py`), dtype,
                             size, SHA-256; size of the file and SHA-256 of its header
        state.json           step, samples, tokens, early stopping …
        manifest.json        SHA-256 of the other JSON files and of itself, the resolved recipe; written
                             last, deleted first
        amendment.json       a newer state.json, if an evaluation was completed after a resume; with its
                             own SHA-256

A SHA-256 covers every bit of every file: rank-N.json has those of the tensors and of the safetensors header,
manifest.json those of the JSON files and of itself. Only regular files of exactly these names are read.
Format 2, which is read too, has the first element of a range (`start`) in place of boxes.
"""

import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drumline.checkpoint.boxes import Box, Boxes, boxes_of_range, fit, make_up
from drumline.checkpoint.state import TrainState, read_state
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.files import (
    RECORD_LIMIT,
    fsync_folder,
    open_regular,
    parse_json,
    without_undefined,
    write_durably,
)

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, FORMAT_VERSION)
MANIFEST = "manifest.json"
STATE = "state.json"
AMENDMENT = "amendment.json"
DIGEST_THREADS = 4
_MOST_DIMENSIONS = 64
"""As torch's tensors may have."""

_NAME = re.compile(r"^step-(\d{8,})$")
_CHUNK = 1 << 22
_LARGEST_HEADER = 100 << 20
_NOT_A_FILE = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR, errno.ENOTDIR)
"""What opening something that is not a regular file gives; a checkpoint holds regular files only."""
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
"""Bits of an element, by the dtype's name in a safetensors header."""
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
          "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip
"""Bytes of an element, by the dtype's name in a rank's manifest."""


def checkpoint_name(step: int) -> str:
    """The folder name of a step, such as `step-00000200`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else None


def shard_name(rank: int) -> str:
    """The file name of a rank's tensors."""
    return f"rank-{rank}.safetensors"


def rank_manifest_name(rank: int) -> str:
    """The file name of a rank's manifest, which describes its tensors."""
    return f"rank-{rank}.json"


def sha256(raw: Any) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(raw).hexdigest()


def write_rank_manifest(
    folder: Path,
    rank: int,
    tensors: dict[str, dict[str, Any]],
    weight_sums: dict[str, Any] | None = None,
) -> str:
    """Write the manifest of a rank's shard, which is already on disk; returns the manifest's SHA-256.

    `tensors`: name -> shape (global), boxes, dtype, bytes, sha256. `weight_sums`: sums over the weights among
    them, if computed (`checkpoint/weights.py`).
    """
    path = folder / shard_name(rank)
    start = _data_start(path)
    with path.open("rb") as file:
        header = file.read(start)
        size = os.fstat(file.fileno()).st_size
    described = {"bytes": size, "header_sha256": sha256(header), "tensors": tensors}
    if weight_sums:
        described["weight_sums"] = without_undefined(weight_sums)
    raw = _encode(described)
    write_durably(folder / rank_manifest_name(rank), raw)
    return sha256(raw)


def write_manifest(
    folder: Path,
    state: dict[str, Any],
    rank_digests: list[str],
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write state.json, then manifest.json, which completes the checkpoint.

    `recipe`: the resolved recipe, so that the run can be reproduced from the checkpoint alone.
    """
    raw = _encode(without_undefined(state))
    write_durably(folder / STATE, raw)
    files = {rank_manifest_name(rank): digest for rank, digest in enumerate(rank_digests)}
    content = {"format": FORMAT_VERSION, "step": state["step"], "ranks": len(rank_digests),
               "files": {**files, STATE: sha256(raw)}, "recipe": recipe}  # fmt: skip
    write_durably(folder / MANIFEST, _encode(_with_digest(content)))


def verify(path: Path, ranks: Iterable[int] | None = None) -> TrainState:
    """Verify the state, and every bit of the shards of `ranks` (default: all); returns the state.

    CheckpointError names the first file that differs from what was saved.
    """
    index = read_manifest(path)
    try:
        state = read_state(_json_of(path, STATE, index["files"][STATE]))
    except ValueError as error:
        raise CheckpointError(f"{path / STATE}: {error}") from None
    if state.step != index["step"]:
        raise CheckpointError(f"{path / STATE}: step {state.step}, the manifest says another")
    state = _amended(path, state)
    for rank in range(index["ranks"]) if ranks is None else ranks:
        if rank < index["ranks"]:
            _verify_shard(path, rank, index["files"][rank_manifest_name(rank)])
    if ranks is None:
        _check_coverage(path, index["ranks"])
    return state


def write_amendment(path: Path, state: dict[str, Any]) -> None:
    """Write amendment.json with the newer state of a published checkpoint, atomically."""
    write_durably(path / AMENDMENT, _encode(_with_digest({"state": without_undefined(state)})))
    fsync_folder(path)


def _amended(path: Path, state: TrainState) -> TrainState:
    where = path / AMENDMENT
    if not os.path.lexists(where):
        return state
    try:
        amended = read_state(_self_checked(where)["state"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{where}: it is not what was saved") from None
    if amended.step != state.step:
        raise CheckpointError(f"{where}: step {amended.step} in a checkpoint of {state.step}")
    return amended


def _with_digest(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "sha256": sha256(_encode(content))}


def _self_checked(where: Path) -> dict[str, Any]:
    """Read a file that contains the SHA-256 of its own content, verify it, and drop the digest."""
    raw = _read(where)
    found = _parse(where, raw)
    digest = found.pop("sha256", None)
    if sha256(_encode(found)) != digest or _encode({**found, "sha256": digest}) != raw:
        raise CheckpointError(f"{where}: it is not what was saved")
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json; CheckpointError where its digest, file list or step is wrong."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link, not a checkpoint")
    where = path / MANIFEST
    found = _self_checked(where)
    if found.get("format") not in READABLE_VERSIONS:
        raise CheckpointError(f"{where}: format {found.get('format')}, not {FORMAT_VERSION}")
    ranks, files = found.get("ranks"), found.get("files")
    if not isinstance(files, dict) or not isinstance(ranks, int) or ranks != len(files) - 1:
        raise CheckpointError(f"{where}: {ranks} ranks do not go with its list of files")
    if set(files) != {STATE, *(rank_manifest_name(rank) for rank in range(ranks))}:
        raise CheckpointError(f"{where}: it lists files that no checkpoint has: {sorted(files)}")
    if step_of(path) not in (None, found.get("step")):
        raise CheckpointError(f"{where}: step {found.get('step')} in a folder of another name")
    return found


def digest_of(index: dict[str, Any]) -> str:
    """SHA-256 of a manifest that was read, which covers every bit of its checkpoint but amendments."""
    return sha256(_encode(index))


def read_entries(path: Path, rank: int) -> dict[str, Any]:
    """The entries of a rank's manifest: tensor name -> shape, boxes, dtype, bytes, sha256."""
    where = path / rank_manifest_name(rank)
    return _entries_of(where, _parse(where, _read(where)))


def _entries_of(where: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parsed rank manifest; CheckpointError for one of another type or size."""
    tensors = described.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{where}: it is not what was saved")
    entries = {}
    for name, entry in tensors.items():
        try:
            entries[name] = {**entry, "boxes": _boxes_of(entry)}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise CheckpointError(
                f"{where}: tensor {name}: its shape, boxes and size do not go together"
            ) from None
    return entries


def _boxes_of(entry: dict[str, Any]) -> Boxes:
    """The boxes of an entry; ValueError where they are not within the tensor, or not its bytes."""
    shape = tuple(int(size) for size in entry["shape"])
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions")
    count = int(entry["bytes"]) // WIDTHS[entry["dtype"]]
    if "boxes" in entry:
        boxes = tuple(
            Box(tuple(map(int, offsets)), tuple(map(int, sizes)))
            for offsets, sizes in entry["boxes"]
        )
    else:
        start = int(entry["start"])
        if count < 0 or start < 0 or start + count > math.prod(shape):
            raise ValueError(f"{count} elements from {start} on")
        boxes = boxes_of_range(shape, start, count)
    if not fit(shape, boxes) or sum(box.volume for box in boxes) != count:
        raise ValueError(f"{boxes} of {shape}")
    return boxes


def _check_coverage(path: Path, ranks: int) -> None:
    """Raise CheckpointError unless the ranks' parts make up each tensor, once and with one shape."""
    parts: dict[str, list[Box]] = {}
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for rank in range(ranks):
        for name, entry in read_entries(path, rank).items():
            parts.setdefault(name, []).extend(entry["boxes"])
            shapes.setdefault(name, set()).add(tuple(entry["shape"]))
    for name, found in parts.items():
        if len(shapes[name]) > 1:
            raise CheckpointError(f"{path}: tensor {name}: its parts have different shapes")
        (shape,) = shapes[name]
        if not make_up(shape, found):
            raise CheckpointError(
                f"{path}: tensor {name}: it is not whole in it, or its parts overlap"
            )


def read_weight_sums(path: Path, rank: int) -> dict[str, Any] | None:
    """The sums over a rank's weights from its manifest; None where it has none."""
    where = path / rank_manifest_name(rank)
    return _parse(where, _read(where)).get("weight_sums")


def tensor_bytes(path: Path, rank: int, name: str) -> bytes:
    """A tensor's raw little-endian bytes from a rank's shard."""
    where = path / shard_name(rank)
    start = _data_start(where)
    with where.open("rb") as file:
        begin, end = _parse(where, file.read(start)[8:])[name]["data_offsets"]
        file.seek(start + begin)
        return file.read(end - begin)


def _verify_shard(path: Path, rank: int, digest: str) -> None:
    """Verify a rank's manifest, its shard's size and header, then the bytes of every tensor."""
    described = _json_of(path, rank_manifest_name(rank), digest)
    where = path / shard_name(rank)
    tensors = _entries_of(path / rank_manifest_name(rank), described)
    descriptor = _open(where)
    try:
        size = os.fstat(descriptor).st_size
        if size != described["bytes"]:
            raise CheckpointError(f"{where}: {size} bytes, {described['bytes']} were saved")
        start = _data_start(where)
        header = os.pread(descriptor, start, 0)
        if sha256(header) != described["header_sha256"]:
            raise CheckpointError(f"{where}: its header is not what was saved")
        places = _places(where, header, size - start)
        if set(places) != set(tensors):
            raise CheckpointError(f"{where}: it does not hold the tensors that it should")

        def check(name: str) -> str | None:
            begin, end = places[name]
            sound = _digest_of(descriptor, start + begin, end - begin) == tensors[name]["sha256"]
            return None if sound else name

        with ThreadPoolExecutor(DIGEST_THREADS) as threads:
            bad = next((name for name in threads.map(check, places) if name), None)
        if bad:
            raise CheckpointError(f"{where}: tensor {bad} is not what was saved")
    except OSError as error:
        raise _unreadable(where, error) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: it is not what was saved: {error}") from None
    finally:
        os.close(descriptor)


def _digest_of(descriptor: int, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        chunk = os.pread(descriptor, min(size, _CHUNK), offset)
        if not chunk:
            break
        digest.update(chunk)
        offset, size = offset + len(chunk), size - len(chunk)
    return digest.hexdigest()


def _data_start(path: Path) -> int:
    """Byte offset of the tensors in a safetensors file, after 8 bytes of length and the JSON header."""
    descriptor = _open(path)
    try:
        first, size = os.pread(descriptor, 8, 0), os.fstat(descriptor).st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(descriptor)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size + 1
    if length > min(size - 8, _LARGEST_HEADER):
        raise CheckpointError(f"{path}: it is not a safetensors file")
    return 8 + int(length)


def _places(path: Path, header: bytes, size: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> (begin, end) in bytes; CheckpointError unless the tensors fill the file without gaps."""
    fields = _parse(path, header[8:])
    fields.pop("__metadata__", None)
    places = {}
    for name, tensor in fields.items():
        begin, end = tensor["data_offsets"]
        if (end - begin) * 8 != math.prod(tensor["shape"]) * _BITS.get(tensor["dtype"], -1):
            raise CheckpointError(f"{path}: tensor {name}: its size does not go with its shape")
        places[name] = (begin, end)
    at = 0
    for begin, end in sorted(places.values()):
        if begin != at:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps")
        at = end
    if at != size:
        raise CheckpointError(f"{path}: {size} bytes of tensors, its header says {at}")
    return places


def _json_of(path: Path, name: str, digest: str) -> dict[str, Any]:
    raw = _read(path / name)
    if sha256(raw) != digest:
        raise CheckpointError(f"{path / name}: it is not what was saved")
    return _parse(path / name, raw)


def _read(path: Path) -> bytes:
    descriptor = _open(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            size = os.fstat(descriptor).st_size
            if size > RECORD_LIMIT:
                raise CheckpointError(f"{path}: it is not what was saved ({size:,} bytes)")
            return file.read()
        except OSError as error:
            raise _unreadable(path, error) from None


def _open(path: Path) -> int:
    """Open a regular file without following a link; CheckpointError for anything else."""
    try:
        return open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
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


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        found = parse_json(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: it is not what was saved (not JSON)")
    return found


def _encode(value: dict[str, Any]) -> bytes:
    """Canonical JSON bytes, so that a file can be compared with its re-encoded content."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
