"""A checkpoint's weights in a few numbers, the same however they were split over ranks.

`sha256` is equal only where every bit is. `sketch` is a count-sketch (Charikar, Chen, Farach-Colton 2002) of
all weights: each element, with a fixed random sign, is added to one of 64 sums. The distance of two sketches
estimates the distance of the weights, to a factor of 1 ± 0.09, so that a line in a log is enough to tell how
far two runs came apart.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.manifest import read_entries, read_manifest, tensor_bytes

BUCKETS = 64
_SIGNS_AT_ONCE = 1 << 20
_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

Part = tuple[int, int, dict[str, Any]]
"""First element, rank, entry."""


def weight_facts(path: Path) -> dict[str, Any]:
    """Of `model.*` of a sound checkpoint: step, sha256, elements, norm (L2), sketch [64]."""
    index = read_manifest(path)
    digest = hashlib.sha256()
    sketch = np.zeros(BUCKETS)
    squares, elements = 0.0, 0
    for name, parts in sorted(_tensors(path, index["ranks"]).items()):
        entry = parts[0][2]
        digest.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        raw = b"".join(tensor_bytes(path, rank, name) for _, rank, _ in parts)
        digest.update(raw)
        values = _values(raw, entry["dtype"])
        if values is not None:
            sketch += _sketch(name, values)
            squares += float(values @ values)
            elements += len(values)
    return {
        "step": index["step"],
        "sha256": digest.hexdigest(),
        "elements": elements,
        "norm": math.sqrt(squares),
        "sketch": sketch.tolist(),
    }


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """‖a − b‖ / ‖a‖, estimated; 0 where they are bitwise equal, infinite where not comparable."""
    if a["sha256"] == b["sha256"]:
        return 0.0
    if a["elements"] != b["elements"]:
        return math.inf
    apart = math.dist(a["sketch"], b["sketch"])
    return apart / a["norm"] if a["norm"] and math.isfinite(apart) else math.inf


def _tensors(path: Path, ranks: int) -> dict[str, list[Part]]:
    """The parts of each tensor of the model, in row-major order."""
    found: dict[str, list[Part]] = {}
    for rank in range(ranks):
        for name, entry in read_entries(path, rank).items():
            if name.startswith("model."):
                found.setdefault(name, []).append((entry["start"], rank, entry))
    return {name: sorted(parts, key=lambda part: part[:2]) for name, parts in found.items()}


def _values(raw: bytes, dtype: str) -> NDArray[np.float64] | None:
    """All elements in fp64; None for whole numbers."""
    if dtype not in _DTYPES:
        return None
    stored = np.frombuffer(raw, dtype=_DTYPES[dtype])
    if dtype == "bfloat16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    return stored.astype(np.float64)


def _sketch(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed sums of the elements: element i goes to sum i mod 64; the name seeds the signs."""
    total = np.zeros(BUCKETS)
    for first, signs in zip(range(0, len(values), _SIGNS_AT_ONCE), _signs(name), strict=False):
        chunk = values[first : first + _SIGNS_AT_ONCE]
        signed = np.zeros(-(-len(chunk) // BUCKETS) * BUCKETS)
        signed[: len(chunk)] = np.where(signs[: len(chunk)], chunk, -chunk)
        total += signed.reshape(-1, BUCKETS).sum(axis=0)
    return total


def _signs(name: str) -> Iterator[NDArray[np.bool_]]:
    """Endless blocks of fair bits; PCG64's raw stream is the same in every version of numpy."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    source = np.random.PCG64(seed)
    while True:
        words = source.random_raw(_SIGNS_AT_ONCE // 64).astype("<u8")
        yield np.unpackbits(words.view(np.uint8)).astype(np.bool_)
