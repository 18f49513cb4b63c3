"""Writes, reads and verifies a rank's files of a checkpoint: its tensors, and the manifest of them."""

import hashlib
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drumline.checkpoint.boxes import Box, Boxes, boxes_of_range, fit, make_up
from drumline.checkpoint.files import (
    encode,
    open_file,
    parse,
    read_file,
    read_listed,
    sha256,
    unreadable,
)
from drumline.errors import CheckpointError
from drumline.files import without_undefined, write_durably

DIGEST_THREADS = 4
_MOST_DIMENSIONS = 64
"""As torch's tensors may have."""
_CHUNK = 1 << 22
_LARGEST_HEADER = 100 << 20
_FROZEN = "frozen"
"""The key of a rank's manifest that describes its file of frozen weights."""
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
"""Bits of an element, by the dtype's name in a safetensors header."""
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
          "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip
"""Bytes of an element, by the dtype's name in a rank's manifest."""


def shard_name(rank: int) -> str:
    """The file name of a rank's tensors."""
    return f"rank-{rank}.safetensors"


def frozen_name(rank: int) -> str:
    """The file name of a rank's weights that training has left as they were, if it has any."""
    return f"rank-{rank}.frozen.safetensors"


def rank_manifest_name(rank: int) -> str:
    """The file name of a rank's manifest, which describes its tensors."""
    return f"rank-{rank}.json"


def describe_file(path: Path, tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a rank's manifest says of a safetensors file on disk.

    `tensors`: name -> shape (global), boxes, dtype, bytes, sha256.
    """
    start = _data_start(path)
    with path.open("rb") as file:
        header = file.read(start)
        size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "header_sha256": sha256(header), "tensors": tensors}


def write_rank_manifest(
    folder: Path,
    rank: int,
    tensors: dict[str, dict[str, Any]],
    *,
    frozen: dict[str, Any] | None = None,
    weight_sums: dict[str, Any] | None = None,
) -> str:
    """Write the manifest of a rank's shard, which is already on disk; returns the manifest's SHA-256.

    `tensors` as in `describe_file`, and `frozen` its result for the file of `frozen_name`, if there is one.
    `weight_sums`: sums over the weights among all of them, if computed (`checkpoint/weights.py`).
    """
    described = describe_file(folder / shard_name(rank), tensors)
    if frozen:
        described[_FROZEN] = frozen
    if weight_sums:
        described["weight_sums"] = without_undefined(weight_sums)
    raw = encode(described)
    write_durably(folder / rank_manifest_name(rank), raw)
    return sha256(raw)


def read_frozen(path: Path, rank: int) -> dict[str, Any] | None:
    """What a rank's manifest says of its file of frozen weights; None where it has none."""
    return _read_rank_manifest(path, rank).get(_FROZEN)


def read_entries(path: Path, rank: int) -> dict[str, Any]:
    """The entries of a rank's manifest: tensor name -> shape, boxes, dtype, bytes, sha256, file.

    CheckpointError where two of its files have a tensor of one name.
    """
    where = path / rank_manifest_name(rank)
    entries: dict[str, Any] = {}
    for file, part in _files_of(where, rank, _read_rank_manifest(path, rank)).items():
        for name, entry in _entries_of(where, part).items():
            if name in entries:
                raise CheckpointError(f"{where}: tensor {name}: it is in two files")
            entries[name] = {**entry, "file": file}
    return entries


def read_weight_sums(path: Path, rank: int) -> dict[str, Any] | None:
    """The sums over a rank's weights from its manifest; None where it has none."""
    return _read_rank_manifest(path, rank).get("weight_sums")


def _read_rank_manifest(path: Path, rank: int) -> dict[str, Any]:
    where = path / rank_manifest_name(rank)
    return parse(where, read_file(where))


def _files_of(where: Path, rank: int, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rank's files by name, with what its manifest says of each; CheckpointError for another type."""
    files = {shard_name(rank): described}
    if _FROZEN in described:
        files[frozen_name(rank)] = described[_FROZEN]
    if not all(isinstance(part, dict) for part in files.values()):
        raise CheckpointError(f"{where}: it is not what was saved")
    return files


def _entries_of(where: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The entries of one file in a rank's manifest; CheckpointError for one of another type or size."""
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


def check_coverage(path: Path, ranks: int) -> None:
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


def tensor_bytes(where: Path, name: str) -> bytes:
    """A tensor's raw little-endian bytes from a rank's file."""
    start = _data_start(where)
    with where.open("rb") as file:
        begin, end = parse(where, file.read(start)[8:])[name]["data_offsets"]
        file.seek(start + begin)
        return file.read(end - begin)


def verify_shard(path: Path, rank: int, digest: str) -> None:
    """Verify a rank's manifest, then each of its files: size, header, the bytes of every tensor."""
    where = path / rank_manifest_name(rank)
    described = read_listed(path, where.name, digest)
    for name, part in _files_of(where, rank, described).items():
        _verify_file(path / name, part, _entries_of(where, part))


def _verify_file(where: Path, described: dict[str, Any], tensors: dict[str, Any]) -> None:
    descriptor = open_file(where)
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
        raise unreadable(where, error) from None
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
    descriptor = open_file(path)
    try:
        first, size = os.pread(descriptor, 8, 0), os.fstat(descriptor).st_size
    except OSError as error:
        raise unreadable(path, error) from None
    finally:
        os.close(descriptor)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else size + 1
    if length > min(size - 8, _LARGEST_HEADER):
        raise CheckpointError(f"{path}: it is not a safetensors file")
    return 8 + int(length)


def _places(path: Path, header: bytes, size: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> (begin, end) in bytes; CheckpointError unless the tensors fill the file without gaps."""
    fields = parse(path, header[8:])
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
