"""The order of samples: a keyed permutation of range(N) per epoch, with O(1) access to any position.

A Feistel network on the grid Z_a × Z_b with a·b just above N; results outside range(N) are permuted
again until they are inside (cycle walking; Black and Rogaway 2002). Up to 256 samples the order is the
argsort of N random keys. It does not depend on the split, on data workers or on earlier steps, so a
resumed run only has to compute its position.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 8
_SMALL = 256
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(31), np.uint64(29))


def indices(seed: int, n: int, epoch: int, start: int, stop: int) -> Indices:
    """Sample indices at positions start..stop (exclusive) of one epoch's order: int64 [stop - start].

    The whole epoch is a permutation of range(n) for every (seed, epoch). Above 256 samples, memory and time
    depend on stop - start only.
    """
    if not 0 <= start <= stop <= n:
        raise IndexError(f"places {start}..{stop} of {n} samples")
    return _at(seed, n, epoch, np.arange(start, stop, dtype=np.int64))


def _at(seed: int | str, n: int, epoch: int, places: Indices) -> Indices:
    """Sample indices at any places of one epoch's order."""
    if n <= _SMALL:
        return np.argsort(_key_stream(seed, n, epoch, n), kind="stable")[places]
    left = math.isqrt(n - 1) + 1
    right = -(-n // left)
    keys = _key_stream(seed, n, epoch, _ROUNDS)
    result = _permute(places.astype(np.uint64), left, right, keys)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        walked = _permute(result[outside], left, right, keys)
        result[outside] = walked
        outside = outside[walked >= n]
    return result.astype(np.int64)


def slot_indices(
    seed: int, n: int, first: int, end: int, sources: Sequence[tuple[int, int]] = ()
) -> Indices:
    """Sample indices of slots first..end (exclusive), which may span epochs: int64.

    `sources`: of a mixture, each with its rows and its share of the n samples of an epoch; the indices are
    then those of rows, source after source.
    """
    parts = []
    while first < end:
        epoch, place = divmod(first, n)
        stop = min(n, place + end - first)
        found = indices(seed, n, epoch + 1, place, stop)
        parts.append(_rows_of(seed, epoch + 1, found, sources) if sources else found)
        first += stop - place
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _rows_of(
    seed: int, epoch: int, samples: Indices, sources: Sequence[tuple[int, int]]
) -> Indices:
    """The rows that an epoch's samples of a mixture are.

    Sample j of a source's share in epoch e is at place (e − 1)·share + j of that source's own order, one pass
    over its rows after the other; so over all epochs no row is seen more than once more than another.
    """
    rows, shares = (np.array(column, dtype=np.int64) for column in zip(*sources, strict=True))
    ends, offsets = np.cumsum(shares), np.cumsum(rows) - rows
    owners = np.searchsorted(ends, samples, side="right")
    places = (epoch - 1) * shares[owners] + samples - (ends - shares)[owners]
    found = np.empty_like(samples)
    passes, within = np.divmod(places, rows[owners])
    for owner in np.unique(owners):
        for number in np.unique(passes[owners == owner]):
            chosen = (owners == owner) & (passes == number)
            own = _at(f"{seed}/source {owner}", int(rows[owner]), int(number) + 1, within[chosen])
            found[chosen] = offsets[owner] + own
    return found


def draw_seeds(seed: int, places: Indices, kind: str = "train") -> NDArray[np.uint64]:
    """Seeds of what is drawn for samples while they are read, such as masks: uint64, one for each place.

    `places`: slots of the order, which tell epoch and sample, or of an evaluation the rows.
    """
    material = hashlib.shake_256(f"drumline draws 1/{seed}/{kind}".encode())
    (key,) = np.frombuffer(material.digest(8), dtype="<u8").astype(np.uint64)
    return _hashed(places.astype(np.uint64), key)


def digest(step_indices: Indices) -> str:
    """The first 16 hex digits of SHA-256 over a step's indices (int64 little-endian, slot order)."""
    return hashlib.sha256(step_indices.astype("<i8").tobytes()).hexdigest()[:16]


def _key_stream(seed: int | str, n: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """Pseudo-random 64-bit keys derived from (seed, n, epoch) by SHAKE-256: uint64 [count]."""
    material = hashlib.shake_256(f"drumline order 1/{seed}/{n}/{epoch}".encode())
    return np.frombuffer(material.digest(8 * count), dtype="<u8").astype(np.uint64)


def _permute(
    places: NDArray[np.uint64], left: int, right: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass of the Feistel network over Z_left × Z_right."""
    width, height = np.uint64(left), np.uint64(right)
    high, low = np.divmod(places, height)
    for number, key in enumerate(keys):
        if number % 2:
            low = (low + _mix(high, key)) % height
        else:
            high = (high + _mix(low, key)) % width
    return high * height + low


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A keyed hash of each value, shifted right by two bits so that a sum cannot overflow."""
    return _hashed(values, key) >> np.uint64(2)


def _hashed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A keyed 64-bit hash of each value."""
    mixed = (values ^ key) * _MIX[0]
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _MIX[1]
    return mixed ^ (mixed >> _SHIFTS[1])
