"""A model of CUDA's caching allocator: the bytes reserved by a sequence of allocations. No torch.

The rules are those of c10's CUDACachingAllocator (torch 2.x). A request is rounded up to 512 B and
served from the smallest free block of its pool and stream that is large enough: requests of at most
1 MiB from 2 MiB segments, others below 10 MiB from 20 MiB segments, larger ones from segments of
their own size rounded up to 2 MiB. The unused rest of a block is split off if it is at least 512 B
(small pool) or more than 1 MiB (large pool). Adjacent free blocks of a segment merge. If a new
segment would exceed the device's limit, all completely free segments are released first.

With expandable segments there is one segment per pool and stream, which grows at its end in pages of
2 or 20 MiB and whose blocks are always split.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from drumline.memory.ledger import ROUND
from drumline.units import MIB

SMALL_REQUEST = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_OF_ITS_OWN = 10 * MIB
ROUND_LARGE = 2 * MIB
FREE = -1

Event = tuple[int, int, int]
"""(block number, bytes or FREE, stream): one allocation, or one free if the size is FREE."""


class DeviceFull(Exception):
    """Out of memory: the request exceeds the limit even after all free segments were released."""


@dataclass(slots=True, eq=False)
class _Block:
    """A part of a segment; `before` and `after` are the adjacent blocks of the same segment."""

    size: int
    pool: "_Pool"
    number: int
    is_free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None


class _Pool:
    """The free blocks of one size class (small or large) on one stream, sorted by size."""

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.free: list[tuple[int, int, _Block]] = []
        self.last: _Block | None = None  # last block of the expandable segment

    def add(self, block: _Block) -> None:
        bisect.insort(self.free, (block.size, block.number, block))

    def remove(self, block: _Block) -> None:
        place = bisect.bisect_left(self.free, (block.size, block.number))
        del self.free[place]

    def smallest_of_at_least(self, size: int) -> _Block | None:
        place = bisect.bisect_left(self.free, (size,))
        return self.free[place][2] if place < len(self.free) else None


class CachingAllocator:
    """Bytes allocated (live requests, rounded up) and reserved (segments held), and the peaks of both.

    `limit` is the device's memory in bytes; None means unlimited.
    """

    def __init__(self, expandable: bool = False, limit: int | None = None) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._expandable, self._limit = expandable, limit
        self._pools: dict[tuple[bool, int], _Pool] = {}
        self._living: dict[int, _Block] = {}
        self._count = 0

    def replay(self, events: Iterable[Event]) -> None:
        """Apply all events in order."""
        for number, size, stream in events:
            if size == FREE:
                self.free(number)
            else:
                self.allocate(number, size, stream)

    def allocate(self, number: int, size: int, stream: int = 0) -> None:
        """Allocate `size` bytes as block `number`; raises DeviceFull if the limit is exceeded."""
        assert number not in self._living, f"block {number} is alive already"
        size = max(ROUND, -(-size // ROUND) * ROUND)
        pool = self._pool(size <= SMALL_REQUEST, stream)
        block = pool.smallest_of_at_least(size) or self._grow(pool, size)
        pool.remove(block)
        self._split(block, size)
        block.is_free = False
        self._living[number] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        """Free block `number` and merge it with adjacent free blocks of its segment."""
        block = self._living.pop(number)
        self.allocated -= block.size
        block.is_free = True
        if block.after and block.after.is_free:
            self._absorb(block, block.after)
        if block.before and block.before.is_free:
            before = block.before
            self._absorb(before, block, is_listed=False)
        else:
            block.pool.add(block)

    def segments(self) -> list[list[tuple[int, bool]]]:
        """All segments, each a list of its blocks in address order: (bytes, is free). For inspection."""
        blocks = {
            block.number: block for pool in self._pools.values() for _, _, block in pool.free
        } | {block.number: block for block in self._living.values()}
        result: list[list[tuple[int, bool]]] = []
        for first in blocks.values():
            if first.before is None:
                row: list[tuple[int, bool]] = []
                block: _Block | None = first
                while block is not None:
                    row.append((block.size, block.is_free))
                    block = block.after
                result.append(row)
        return result

    def _pool(self, is_small: bool, stream: int) -> _Pool:
        key = (is_small, stream)
        if key not in self._pools:
            self._pools[key] = _Pool(is_small)
        return self._pools[key]

    def _new_block(self, size: int, pool: _Pool) -> _Block:
        self._count += 1
        return _Block(size, pool, self._count)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        if self._expandable:
            return self._extend(pool, size)
        if pool.is_small:
            segment = SMALL_SEGMENT
        elif size < SEGMENT_OF_ITS_OWN:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(segment)
        block = self._new_block(segment, pool)
        pool.add(block)
        return block

    def _extend(self, pool: _Pool, size: int) -> _Block:
        """Map whole pages at the end of the pool's expandable segment.

        The last block grows if it is free; otherwise a new block is appended.
        """
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        last = pool.last
        open_end = last.size if last and last.is_free else 0
        more = -(-(size - open_end) // page) * page
        self._reserve(more)
        if last and last.is_free:
            pool.remove(last)
            last.size += more
            pool.add(last)
            return last
        block = self._new_block(more, pool)
        block.before, pool.last = last, block
        if last:
            last.after = block
        pool.add(block)
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        always = block.pool.is_small or self._expandable
        if rest < ROUND if always else rest <= SMALL_REQUEST:
            return
        remainder = self._new_block(rest, block.pool)
        remainder.before, remainder.after = block, block.after
        if block.after:
            block.after.before = remainder
        if block.pool.last is block:
            block.pool.last = remainder
        block.after, block.size = remainder, size
        block.pool.add(remainder)

    def _absorb(self, block: _Block, after: _Block, is_listed: bool = True) -> None:
        """Merge a free block with the block after it.

        `is_listed`: True if `after` is in the pool's free list, False if `block` is. With False, the merged
        block is added to the list again.
        """
        pool = block.pool
        pool.remove(after if is_listed else block)
        block.size += after.size
        block.after = after.after
        if after.after:
            after.after.before = block
        if pool.last is after:
            pool.last = block
        if not is_listed:
            pool.add(block)

    def _reserve(self, size: int) -> None:
        if self._limit is not None and self.reserved + size > self._limit:
            self._give_back()
            if self.reserved + size > self._limit:
                raise DeviceFull(f"{self.reserved} reserved + {size} > {self._limit} bytes")
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self) -> None:
        """Release completely free segments; of an expandable segment, the free pages at its end."""
        for pool in self._pools.values():
            if self._expandable:
                self._unmap_end(pool)
                continue
            for _, _, block in list(pool.free):
                if block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _unmap_end(self, pool: _Pool) -> None:
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        last = pool.last
        if last is None or not last.is_free:
            return
        pages = last.size // page * page
        pool.remove(last)
        last.size -= pages
        self.reserved -= pages
        if last.size:
            pool.add(last)
        else:
            pool.last = last.before
            if last.before:
                last.before.after = None
