"""A model of CUDA's caching allocator: the bytes reserved by a sequence of allocations. No torch.

The rules are those of c10's CUDACachingAllocator (torch 2.x). A request is rounded up to 512 B and
served from the smallest free block of its pool and stream that is large enough: requests of at most
1 MiB from 2 MiB segments, others below 10 MiB from 20 MiB segments, larger ones from segments of
their own size rounded up to 2 MiB. The unused rest of a block is split off if it is at least 512 B
(small pool) or more than 1 MiB (large pool). Adjacent free blocks of a segment merge. If a new
segment would exceed the device's limit, all completely free segments are released first.

With expandable segments there is one segment per pool and stream, which grows at its end in pages of
2 or 20 MiB and whose blocks are always split. At the limit, every page that is wholly free is released;
what is left of its block on either side stays, and is not merged across the hole (torch may map the hole
again, so this needs slightly more memory than torch does).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

from drumline.memory.events import FREE, ROUND, Event
from drumline.units import MIB

SMALL_REQUEST = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_OF_ITS_OWN = 10 * MIB
ROUND_LARGE = 2 * MIB


class DeviceFull(Exception):
    """Out of memory: the request exceeds the limit even after all free segments were released."""


class _Block:
    """A part of a segment, from `address` on; `before` and `after` are the blocks that it touches."""

    __slots__ = ("address", "after", "before", "is_free", "number", "pool", "size")

    def __init__(self, size: int, pool: "_Pool", number: int, address: int = 0) -> None:
        self.size, self.pool, self.number, self.address = size, pool, number, address
        self.is_free = True
        self.before: _Block | None = None
        self.after: _Block | None = None


class _Pool:
    """The free blocks of one size class (small or large) on one stream, sorted by size.

    `least_rest`: bytes that the rest of a block must have to be split off.
    """

    def __init__(self, is_small: bool, is_expandable: bool) -> None:
        self.is_small = is_small
        self.least_rest = ROUND if is_small or is_expandable else SMALL_REQUEST + 1
        self.free: list[tuple[int, int, _Block]] = []
        self.last: _Block | None = None  # last block of the expandable segment
        self.end = 0  # address after the expandable segment

    def add(self, block: _Block) -> None:
        insort(self.free, (block.size, block.number, block))

    def remove(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.number))]


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
        allocate, free = self.allocate, self.free
        for number, size, stream in events:
            if size == FREE:
                free(number)
            else:
                allocate(number, size, stream)

    def allocate(self, number: int, size: int, stream: int = 0) -> None:
        """Allocate `size` bytes as block `number`; raises DeviceFull if the limit is exceeded.

        This and `free` call no methods of their own for the common cases: a plan replays 40,000 allocations.
        """
        assert number not in self._living, f"block {number} is alive already"
        size = max(ROUND, -(-size // ROUND) * ROUND)
        pool = self._pools.get((size <= SMALL_REQUEST, stream)) or self._new_pool(size, stream)
        free = pool.free
        place = bisect_left(free, (size,))  # the smallest free block that is large enough
        block = free.pop(place)[2] if place < len(free) else self._grow(pool, size)
        rest = block.size - size
        if rest >= pool.least_rest:
            self._count = count = self._count + 1
            after, remainder = block.after, _Block(rest, pool, count, block.address + size)
            remainder.before, remainder.after = block, after
            if after is not None:
                after.before = remainder
            elif pool.last is block:
                pool.last = remainder
            block.after, block.size = remainder, size
            insort(free, (rest, count, remainder))
        block.is_free = False
        self._living[number] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, number: int) -> None:
        """Free block `number` and merge it with adjacent free blocks of its segment."""
        block = self._living.pop(number)
        self.allocated -= block.size
        block.is_free = True
        pool, before, after = block.pool, block.before, block.after
        free = pool.free
        if after is not None and after.is_free:
            del free[bisect_left(free, (after.size, after.number))]
            _absorb(block, after)
        if before is not None and before.is_free:
            del free[bisect_left(free, (before.size, before.number))]
            _absorb(before, block)
            block = before
        insort(free, (block.size, block.number, block))

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

    def _new_pool(self, size: int, stream: int) -> _Pool:
        is_small = size <= SMALL_REQUEST
        pool = self._pools[is_small, stream] = _Pool(is_small, self._expandable)
        return pool

    def _new_block(self, size: int, pool: _Pool, address: int = 0) -> _Block:
        self._count += 1
        return _Block(size, pool, self._count, address)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """A block of at least `size` bytes from a new segment, or from the end of the expandable one."""
        if self._expandable:
            return self._extend(pool, size)
        if pool.is_small:
            segment = SMALL_SEGMENT
        elif size < SEGMENT_OF_ITS_OWN:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(segment)
        return self._new_block(segment, pool)

    def _extend(self, pool: _Pool, size: int) -> _Block:
        """Map whole pages at the end of the pool's expandable segment.

        The last block grows if it is free; otherwise a new block is appended.
        """
        more = self._missing(pool, size)
        if self._limit is not None and self.reserved + more > self._limit:
            self._give_back()  # perhaps the segment's end, too
            more = self._missing(pool, size)
        self._reserve(more)
        last = pool.last
        address, pool.end = pool.end, pool.end + more
        if last and last.is_free:
            pool.remove(last)
            last.size += more
            return last
        block = self._new_block(more, pool, address)
        block.before, pool.last = last, block
        if last:
            last.after = block
        return block

    def _missing(self, pool: _Pool, size: int) -> int:
        """Bytes of the pages that must be mapped at the segment's end for a request of `size`."""
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        open_end = pool.last.size if pool.last and pool.last.is_free else 0
        return -(-(size - open_end) // page) * page

    def _reserve(self, size: int) -> None:
        if self._limit is not None and self.reserved + size > self._limit:
            self._give_back()
            if self.reserved + size > self._limit:
                raise DeviceFull(f"{self.reserved} reserved + {size} > {self._limit} bytes")
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self) -> None:
        """Release completely free segments; of expandable segments, completely free pages."""
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _unmap(self, block: _Block) -> None:
        """Release the pages that lie within a free block; what is before and after them stays free."""
        pool = block.pool
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if start >= end:
            return
        pool.remove(block)
        self.reserved -= end - start
        front = self._piece(block, block.address, start)
        back = self._piece(block, end, block.address + block.size)
        if front:
            front.before = block.before
        if block.before:
            block.before.after = front
        if back:
            back.after = block.after
        if block.after:
            block.after.before = back
        if pool.last is block:
            pool.last = back
            if back is None:  # the hole is at the segment's end, which moves to where it begins
                pool.end, pool.last = start, front or block.before

    def _piece(self, block: _Block, start: int, end: int) -> _Block | None:
        """A free block of the same pool between two addresses; None if they are equal."""
        if start == end:
            return None
        piece = self._new_block(end - start, block.pool, start)
        block.pool.add(piece)
        return piece


def _absorb(block: _Block, after: _Block) -> None:
    """Merge a block with the free one after it, which is no longer in the pool's list."""
    block.size += after.size
    block.after = after.after
    if after.after is not None:
        after.after.before = block
    elif after.pool.last is after:
        after.pool.last = block
