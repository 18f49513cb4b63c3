"""Finds a pretrained model's safetensors files, and reads what their headers say; without torch."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from drumline.errors import PlanError
from drumline.files import parse_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100 << 20
_PROBES, _PROBE_BYTES = 256, 4096
"""Places of a file that `fingerprint_of` reads, evenly spaced, and the bytes at each."""


def weights_in(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors by name; None where the folder holds no weights at all.

    PlanError names the file that is missing, damaged or of another format.
    """
    found = headers_in(folder)
    return None if found is None else {k: v for held in found.values() for k, v in held.items()}


def headers_in(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]] | None:
    """Shapes of the tensors in each of the folder's files of weights; None where it has none.

    Raises as `weights_in` does.
    """
    index = folder / _INDEX
    if index.is_file():
        return _of_index(folder, index)
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: _header(folder / _SINGLE)}
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickled:
        raise PlanError(
            f"model.path: {pickled[0]} is a pickle, which can run code when it is read; only safetensors "
            "are read. Nearest: load it once with transformers and call save_pretrained"
        )
    return None


def fingerprint_of(folder: Path) -> str:
    """Fingerprint of a folder's weights from their headers and some bytes at 256 places of each file.

    It takes milliseconds for any size. Other weights of the same shapes differ at some of these places.
    """
    digest = hashlib.sha256()
    for file in sorted(headers_in(folder) or {}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\0".encode())
        with file.open("rb") as opened:
            for place in range(_PROBES):
                opened.seek(place * max(0, size - _PROBE_BYTES) // (_PROBES - 1))
                digest.update(opened.read(_PROBE_BYTES))
    return digest.hexdigest()


def dtypes_in(folder: Path) -> list[str]:
    """The dtypes of a folder's tensors in safetensors' words, such as BF16; that of most tensors first."""
    found: Counter[str] = Counter()
    for file in headers_in(folder) or {}:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            plain: dict[str, Any] = json.loads(opened.read(length))
        found.update(entry["dtype"] for name, entry in plain.items() if name != "__metadata__")
    return [name for name, _ in found.most_common()]


def _of_index(folder: Path, index: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    try:
        shards: dict[str, str] = dict(parse_json(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise PlanError(f"model.path: {index}: not an index of weights") from None
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    for name in sorted(set(shards.values())):
        file = folder / name
        if not file.is_file():
            lost = next(key for key, shard in shards.items() if shard == name)
            raise PlanError(f"model.path: {file} is missing, which {index.name} names for {lost}")
        found[file] = _header(file)
    absent = next((key for key in shards if key not in found[folder / shards[key]]), None)
    if absent is not None:
        raise PlanError(
            f"model.path: {folder / shards[absent]} has no {absent}, which {index.name} says it has"
        )
    return found


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in one file, whose size must be what its header says."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, file.stat().st_size):
            raise PlanError(f"model.path: {file}: not a safetensors file")
        text = opened.read(length)
    try:
        plain: dict[str, Any] = json.loads(text)
        plain.pop("__metadata__", None)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in plain.items()}
        end = max((int(entry["data_offsets"][1]) for entry in plain.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlanError(f"model.path: {file}: not a safetensors file") from None
    needed, size = _LENGTH_BYTES + length + end, file.stat().st_size
    if size != needed:
        raise PlanError(
            f"model.path: {file} has {size:,} bytes, and its header says {needed:,}: it was cut off"
        )
    return shapes
