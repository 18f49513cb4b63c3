"""The order: a permutation per epoch that depends on (seed, N, epoch) alone."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.plan import order


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 3000) | st.integers(250, 260), st.integers(1, 10))
def test_every_epoch_is_a_permutation(seed: int, n: int, epoch: int) -> None:
    """Each index of range(N) once."""
    found = order.indices(seed, n, epoch, 0, n)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**12), st.integers(1, 3), st.data())
def test_a_part_is_the_part_of_the_whole(n: int, epoch: int, data: st.DataObject) -> None:
    """Seeking to a place gives what reading up to it would; far places of huge N included."""
    start = data.draw(st.integers(0, n - 1))
    stop = min(n, start + data.draw(st.integers(1, 50)))
    whole = order.indices(3, n, epoch, start, stop)
    singles = [order.indices(3, n, epoch, place, place + 1)[0] for place in range(start, stop)]
    assert whole.tolist() == singles
    assert len(set(singles)) == len(singles)
    assert all(0 <= index < n for index in singles)


def test_seed_and_epoch_matter_and_nothing_repeats() -> None:
    """Other seeds and epochs give unrelated orders: about one place in N agrees."""
    n = 5000
    base = order.indices(1, n, 1, 0, n)
    for seed, epoch in [(2, 1), (1, 2), (1, 3), (2**62, 1)]:
        other = order.indices(seed, n, epoch, 0, n)
        assert np.mean(base == other) < 10 / n


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_all_reached_about_equally(n: int) -> None:
    """Chi-square over all n! orders of a small N: no order is favoured (p about 1e-4)."""
    draws = 6000
    counts = Counter(tuple(order.indices(9, n, epoch, 0, n)) for epoch in range(1, draws + 1))
    cells = int(np.prod(range(1, n + 1)))
    expected = draws / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += (cells - len(counts)) * expected
    degrees = cells - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees) + 12


def test_neighbours_are_uncorrelated() -> None:
    """The correlation of neighbouring places is that of chance (4 sigma)."""
    n = 20000
    found = order.indices(4, n, 1, 0, n).astype(float)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_slots_cross_epochs() -> None:
    """Slot s lies in epoch s // N + 1; a step may span several."""
    n = 7
    epochs = np.concatenate([order.indices(5, n, epoch, 0, n) for epoch in (1, 2, 3)])
    for first in range(20):
        for end in range(first, 21):
            assert np.array_equal(order.slot_indices(5, n, first, end), epochs[first:end])


def test_the_digest_is_sha256_of_int64_little_endian() -> None:
    """The first 16 hex digits, in slot order, as the design says."""
    indices = np.array([3, 1, 2**40])
    raw = b"".join(int(i).to_bytes(8, "little") for i in indices)
    assert order.digest(indices) == hashlib.sha256(raw).hexdigest()[:16]
    assert order.digest(indices) != order.digest(indices[::-1])


def test_the_order_never_changes_between_releases() -> None:
    """A run logged a year ago must find its samples again: these digests are frozen."""
    digests = [order.digest(order.slot_indices(17, n, 5, 25)) for n in (10, 100, 10**9)]
    assert digests == FROZEN


FROZEN = ["d45fe04d7165a5d7", "1c30f0a16d3aab7f", "58142aec0e723e08"]
