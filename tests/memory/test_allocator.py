"""The model of CUDA's caching allocator: each rule by hand, and what must hold whatever happens."""

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.memory.allocator import CachingAllocator, DeviceFull
from drumline.memory.events import FREE, Event
from drumline.units import MIB


def played(*sizes: int, **options: Any) -> CachingAllocator:
    """An allocator after these requests, numbered from 0; a negative one frees that number less 1."""
    allocator = CachingAllocator(**options)
    number = 0
    for size in sizes:
        if size < 0:
            allocator.free(-size - 1)
        else:
            allocator.allocate(number, size)
            number += 1
    return allocator


@pytest.mark.parametrize(
    ("sizes", "allocated", "reserved"),
    [
        ((1,), 512, 2 * MIB),  # rounded to 512, from a small segment
        ((513,), 1024, 2 * MIB),
        ((MIB,), MIB, 2 * MIB),  # the largest small request
        ((MIB, MIB), 2 * MIB, 2 * MIB),  # two share a small segment
        ((MIB, MIB, 512), 2 * MIB + 512, 4 * MIB),
        ((MIB + 1,), MIB + 512, 20 * MIB),  # the smallest large one
        ((9 * MIB, 9 * MIB), 18 * MIB, 20 * MIB),
        ((10 * MIB,), 10 * MIB, 10 * MIB),  # a segment of its own from 10 MiB on
        (
            (10 * MIB + 512,),
            10 * MIB + 512,
            12 * MIB,
        ),  # rounded to 2 MiB; a rest above 1 MiB goes back
        ((11 * MIB,), 12 * MIB, 12 * MIB),  # one of 1 MiB stays with its block
    ],
)
def test_requests_by_hand(sizes: tuple[int, ...], allocated: int, reserved: int) -> None:
    """Rounding, the three kinds of segments, and when the rest of a block is split off."""
    found = played(*sizes)
    assert (found.allocated, found.reserved) == (allocated, reserved)


def test_freed_neighbours_merge_and_are_used_again() -> None:
    """Three blocks of a segment, freed in any order, become one that serves a larger request."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)):
        found = played(5 * MIB, 5 * MIB, 5 * MIB, *(-n - 1 for n in order))
        assert found.segments() == [[(20 * MIB, True)]]
        found.allocate(9, 9 * MIB)
        assert found.reserved == 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    """Best fit: of free blocks of 12, 20 and 40 MiB a request of 18 takes that of 20."""
    found = played(12 * MIB, 20 * MIB, 40 * MIB, -1, -2, -3)
    found.allocate(9, 18 * MIB + 512 * 1024 * 3)
    assert sorted(found.segments()) == [[(12 * MIB, True)], [(20 * MIB, False)], [(40 * MIB, True)]]


def test_streams_do_not_share_blocks() -> None:
    """What is free on one stream does not serve another."""
    found = CachingAllocator()
    found.allocate(0, 30 * MIB, stream=0)
    found.free(0)
    found.allocate(1, 30 * MIB, stream=1)
    assert found.reserved == 60 * MIB
    found.allocate(2, 30 * MIB, stream=0)
    assert found.reserved == 60 * MIB


def test_free_segments_are_given_back_before_the_device_is_full() -> None:
    """At the limit wholly free segments go; what is partly used stays, and then it is full."""
    found = played(30 * MIB, 30 * MIB, -1, limit=64 * MIB)
    found.allocate(9, 32 * MIB)
    assert found.reserved == 62 * MIB
    with pytest.raises(DeviceFull, match="reserved"):
        found.allocate(10, 4 * MIB)


def test_an_expandable_segment_grows_at_its_end() -> None:
    """Pages of 20 MiB; a free end is filled up first, and every rest is split off."""
    found = played(11 * MIB, 11 * MIB, expandable=True)
    assert found.reserved == 40 * MIB
    assert found.segments() == [[(11 * MIB, False), (11 * MIB, False), (18 * MIB, True)]]
    found.allocate(9, 30 * MIB)
    assert found.reserved == 60 * MIB


def test_fragmentation_shows_in_reserved_only() -> None:
    """Two free segments of 12 MiB cannot serve 24 MiB; neighbours in an expandable one can."""
    sizes = (12 * MIB, 12 * MIB, 12 * MIB, 12 * MIB, -1, -2, 24 * MIB)
    classic, expandable = played(*sizes), played(*sizes, expandable=True)
    assert classic.allocated == expandable.allocated == 48 * MIB
    assert classic.reserved == 72 * MIB
    assert expandable.reserved == 60 * MIB


def test_at_the_limit_free_pages_of_an_expandable_segment_are_released() -> None:
    """Also in its middle: what is left of 60 free MiB between two blocks is their pages' remainders."""
    sizes = (30 * MIB, 60 * MIB, 30 * MIB, -2)
    found = played(*sizes, expandable=True, limit=165 * MIB)
    assert found.reserved == 120 * MIB
    found.allocate(9, 50 * MIB)  # best fit: within the 60 that are free
    assert found.reserved == 120 * MIB
    found.free(9)
    found.allocate(10, 65 * MIB)  # 40 MiB of whole pages are released, and 80 mapped at the end
    assert (found.reserved, found.allocated) == (160 * MIB, 125 * MIB)


def random_events(seed: int, count: int) -> list[Event]:
    draw, alive, events, number = random.Random(seed), [], [], 0
    for _ in range(count):
        if alive and draw.random() < 0.48:
            events.append((alive.pop(draw.randrange(len(alive))), FREE, 0))
        else:
            size = int(2 ** draw.uniform(0, 26))
            events.append((number, size, draw.randrange(2)))
            alive.append(number)
            number += 1
    return events


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_whatever_happens_blocks_tile_their_segments(seed: int, expandable: bool) -> None:
    """No overlap, no two free neighbours, allocated ≤ reserved, and all free again at the end."""
    events = random_events(seed, 300)
    found = CachingAllocator(expandable)
    alive = {}
    for event in events:
        found.replay([event])
        number, size, _ = event
        if size == FREE:
            del alive[number]
        else:
            alive[number] = size
        assert sum(alive.values()) <= found.allocated <= found.reserved <= found.peak_reserved
    segments = found.segments()
    blocks = [block for segment in segments for block in segment]
    assert sum(size for size, _ in blocks) == found.reserved
    assert sum(size for size, is_free in blocks if not is_free) == found.allocated
    for segment in segments:
        for (_, one), (_, other) in itertools.pairwise(segment):
            assert not (one and other), "two free neighbours were not merged"
    for number in alive:
        found.free(number)
    assert found.allocated == 0
    assert all(len(segment) == 1 and segment[0][1] for segment in found.segments())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.floats(0.5, 1.1))
def test_at_any_limit_it_is_kept_or_the_device_is_full(
    seed: int, expandable: bool, share: float
) -> None:
    """Reserved bytes stay within the limit, what is alive is always reserved, and blocks tile what is."""
    events = random_events(seed, 300)
    free = CachingAllocator(expandable)
    free.replay(events)
    limit = int(share * free.peak_reserved)
    found = CachingAllocator(expandable, limit)
    try:
        for event in events:
            found.replay([event])
            assert found.allocated <= found.reserved <= limit
    except DeviceFull:
        assert limit < free.peak_reserved
        return
    blocks = [block for segment in found.segments() for block in segment]
    assert sum(size for size, _ in blocks) == found.reserved
    assert sum(size for size, is_free in blocks if not is_free) == found.allocated
