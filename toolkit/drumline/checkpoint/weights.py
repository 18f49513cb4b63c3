"""Summarises a checkpoint's weights in a few numbers that do not depend on how ranks shard them.

Every number is a sum over elements, so each rank sums its own shards while it saves, and the sums are added:

- `checksum`: 128 bits, equal only if every bit of every element is equal (no defence against forgery);
- `norm`: the L2 norm;
- `sketch`: a count-sketch (Charikar, Chen, Farach-Colton 2002): each element, with a fixed random sign, is
  added to one of 64 sums. The distance of two sketches estimates the distance of the weights, to a factor of
  1 ± 0.09, so two log lines are enough to compare the weights of two runs.

Records of earlier versions have a `sha256` of all weights instead of the checksum; `weights_sha256` computes
it.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from drumline.checkpoint.boxes import Boxes, runs
from drumline.checkpoint.manifest import read_manifest
from drumline.checkpoint.shards import WIDTHS, read_entries, read_weight_sums, tensor_bytes
from drumline.errors import CheckpointError

WEIGHTS = "model."
"""Prefix of the weights' names among all tensors of a checkpoint."""
BUCKETS = 64
_AT_ONCE = 1 << 20
"""Elements summed at a time; a multiple of the 64 signs in one random word."""
_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_LANES = 2
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(31), np.uint64(29), np.uint64(32))

Part = dict[str, Any]
"""What a rank's manifest says of a tensor."""


@dataclass
class WeightSums:
    """Sums over some weights: their number, their squares, the sketch, the checksum's two 64-bit halves."""

    elements: int = 0
    squares: float = 0.0
    sketch: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BUCKETS))
    lanes: list[int] = field(default_factory=lambda: [0] * _LANES)

    def __add__(self, other: "WeightSums") -> "WeightSums":
        lanes = [(a + b) % (1 << 64) for a, b in zip(self.lanes, other.lanes, strict=True)]
        return WeightSums(
            elements=self.elements + other.elements,
            squares=self.squares + other.squares,
            sketch=self.sketch + other.sketch,
            lanes=lanes,
        )

    def to_plain(self) -> dict[str, Any]:
        """The JSON form for a rank's manifest."""
        return {
            "elements": self.elements,
            "squares": self.squares,
            "sketch": self.sketch.tolist(),
            "lanes": self.lanes,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """From the JSON form in a rank's manifest."""
        squares = math.nan if plain["squares"] is None else plain["squares"]
        sketch = np.array(plain["sketch"], dtype=np.float64)
        return cls(plain["elements"], squares, sketch, plain["lanes"])


def sum_weights(
    name: str, dtype: str, shape: list[int], boxes: Boxes, raw: NDArray[np.uint8]
) -> WeightSums:
    """The sums over a part of one tensor of this shape; `raw`: the bytes of its boxes, box after box.

    The checksum covers every dtype; the other sums cover floating-point dtypes only.
    """
    bits = raw.view(f"<u{WIDTHS[dtype]}")
    key = hashlib.sha256(f"{name}\0{dtype}\0{shape}".encode()).digest()
    seeds = np.frombuffer(key[: 8 * _LANES], dtype="<u8")
    values = _values(raw, dtype)
    total = WeightSums(elements=0 if values is None else len(bits))
    low = 0
    for box in boxes:
        for start, count in runs(shape, box):
            part = slice(low, low + count)
            _add_run(
                total, name, seeds, start, bits[part], None if values is None else values[part]
            )
            low += count
    return total


def _add_run(total: WeightSums, name: str, seeds: NDArray[np.uint64], start: int, bits: NDArray[Any],
             values: NDArray[Any] | None) -> None:  # fmt: skip
    """Add the sums over contiguous elements of the flattened tensor, from element `start` on."""
    signs = None if values is None else _signs(name, start // BUCKETS)
    at = start
    with np.errstate(over="ignore"):
        while at < start + len(bits):
            lead = at % BUCKETS
            count = min(_AT_ONCE - lead, start + len(bits) - at)
            low = at - start
            places = np.arange(at, at + count, dtype=np.uint64)
            for lane, seed in enumerate(seeds):
                mixed = _mixed(bits[low : low + count].astype(np.uint64), places, seed)
                total.lanes[lane] = (total.lanes[lane] + int(mixed)) % (1 << 64)
            if values is not None and signs is not None:
                chunk = values[low : low + count].astype(np.float64)
                total.squares += float(chunk @ chunk)
                total.sketch += _sketch(chunk, next(signs)[lead : lead + count], lead)
            at += count


def weight_facts(path: Path) -> dict[str, Any]:
    """Step, checksum, elements, norm (L2) and sketch [64] of a sound checkpoint.

    Adds the sums in the per-rank manifests; if one has none, computes them from the weights.
    """
    index = read_manifest(path)
    total = WeightSums()
    for rank in range(index["ranks"]):
        saved = read_weight_sums(path, rank)
        if saved is None:
            total = _sums_of_files(path, index["ranks"])
            break
        try:
            total += WeightSums.from_plain(saved)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: the sums of its weights are not what was saved: {error}"
            ) from None
    if not math.isfinite(total.squares):
        raise CheckpointError(f"{path}: some of its weights are not finite")
    return {
        "step": index["step"],
        "checksum": _checksum(total),
        "elements": total.elements,
        "norm": math.sqrt(total.squares),
        "sketch": total.sketch.tolist(),
    }


def refuse_other_weights(path: Path, recorded: dict[str, Any] | None) -> None:
    """Raise CheckpointError if these are not the final weights that the run's record names.

    Reads every weight. Nothing is compared where the record has no final weights, or those of another step.
    """
    index = read_manifest(path)
    if not recorded or recorded["step"] != index["step"]:
        return
    name = "checksum" if recorded.get("checksum") else "sha256"
    found = (
        _checksum(_sums_of_files(path, index["ranks"]))
        if name == "checksum"
        else weights_sha256(path)
    )
    if found != recorded.get(name):
        raise CheckpointError(
            f"{path}: its weights are not those that record.json names (weights.{name}); somebody has "
            "replaced them"
        )


def _checksum(total: WeightSums) -> str:
    return "".join(f"{lane:016x}" for lane in total.lanes)


def weights_sha256(path: Path) -> str:
    """SHA-256 over all weights in the order of their names, as in records of earlier versions."""
    digest = hashlib.sha256()
    for name, parts in sorted(_tensors(path, read_manifest(path)["ranks"]).items()):
        entry = parts[0]
        digest.update(f"{name}\0{entry['dtype']}\0{entry['shape']}\0".encode())
        digest.update(_whole_bytes(path, name, parts).data)
    return digest.hexdigest()


def identity_of(facts: dict[str, Any]) -> str | None:
    """The checksum or, in earlier records, the SHA-256; equal only if the weights are bitwise equal."""
    return facts.get("checksum") or facts.get("sha256")


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Estimate of ‖a − b‖ / ‖a‖; 0 where bitwise equal, infinite where not comparable."""
    for exact in ("checksum", "sha256"):
        if a.get(exact) is not None and a.get(exact) == b.get(exact):
            return 0.0
    if a["elements"] != b["elements"]:
        return math.inf
    apart = math.dist(a["sketch"], b["sketch"])
    return apart / a["norm"] if a["norm"] and math.isfinite(apart) else math.inf


def _sums_of_files(path: Path, ranks: int) -> WeightSums:
    total = WeightSums()
    for name, parts in _tensors(path, ranks).items():
        for entry in parts:
            raw = np.frombuffer(tensor_bytes(path / entry["file"], name), dtype=np.uint8)
            total += sum_weights(name, entry["dtype"], entry["shape"], entry["boxes"], raw)
    return total


def _tensors(path: Path, ranks: int) -> dict[str, list[Part]]:
    """The parts of each tensor of the model."""
    found: dict[str, list[Part]] = {}
    for rank in range(ranks):
        for name, entry in read_entries(path, rank).items():
            if name.startswith(WEIGHTS):
                found.setdefault(name, []).append(entry)
    return found


def _whole_bytes(path: Path, name: str, parts: list[Part]) -> NDArray[np.uint8]:
    """The bytes of a whole tensor in row-major order."""
    entry = parts[0]
    width = WIDTHS[entry["dtype"]]
    whole = np.empty(math.prod(entry["shape"]) * width, dtype=np.uint8)
    for part in parts:
        raw = np.frombuffer(tensor_bytes(path / part["file"], name), dtype=np.uint8)
        low = 0
        for box in part["boxes"]:
            for start, count in runs(entry["shape"], box):
                size = count * width
                whole[start * width : start * width + size] = raw[low : low + size]
                low += size
    return whole


def _values(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any] | None:
    """The elements as floating-point numbers; None for integer and bool dtypes."""
    if dtype not in _DTYPES:
        return None
    stored: NDArray[Any] = raw.view(_DTYPES[dtype])
    if dtype == "bfloat16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    return stored


def _mixed(bits: NDArray[np.uint64], places: NDArray[np.uint64], seed: np.uint64) -> np.uint64:
    """Σ of a 64-bit hash of each element's bits and position, modulo 2^64."""
    mixed = (bits + seed) * _MIX[1] ^ (places * _MIX[0])
    for multiplier, shift in zip(_MIX, _SHIFTS, strict=True):
        mixed ^= mixed >> shift
        mixed *= multiplier
    mixed ^= mixed >> _SHIFTS[0]
    return np.add.reduce(mixed)  # type: ignore[no-any-return]


def _sketch(
    values: NDArray[np.float64], signs: NDArray[np.bool_], lead: int
) -> NDArray[np.float64]:
    """Signed sums [64]: element i of the tensor is added to sum i mod 64; the first one here to `lead`."""
    signed = np.zeros(-(-(lead + len(values)) // BUCKETS) * BUCKETS)
    signed[lead : lead + len(values)] = np.where(signs, values, -values)
    total: NDArray[np.float64] = signed.reshape(-1, BUCKETS).sum(axis=0)
    return total


def _signs(name: str, first_word: int) -> Iterator[NDArray[np.bool_]]:
    """Endless blocks of random bits, seeded by the name, from 64-bit word `first_word` on.

    PCG64's raw stream is the same in every version of numpy and can start at any word.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    source = np.random.PCG64(seed)
    source.advance(first_word)
    while True:
        words = source.random_raw(_AT_ONCE // BUCKETS).astype("<u8")
        yield np.unpackbits(words.view(np.uint8)).astype(np.bool_)
