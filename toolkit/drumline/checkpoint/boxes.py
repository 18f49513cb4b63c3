"""Parts of a tensor as boxes: which elements a rank holds, whatever dimension they are split along. Pure.

A part is a list of boxes, and its elements are stored box after box, each in row-major order. A range of the
flattened tensor, such as ZeRO's partitions, is at most 2·ndim − 1 boxes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangular part of a tensor: per dimension the first index, and how many follow from it on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a tensor without dimensions."""
        return math.prod(self.sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between neighbours in each dimension, where the box is stored by itself."""
        return row_major_strides(self.sizes)

    def within(self, other: "Box") -> tuple[slice, ...]:
        """The slices that select this box from a tensor that holds exactly `other`, which contains it."""
        starts = [mine - its for mine, its in zip(self.offsets, other.offsets, strict=True)]
        return tuple(slice(at, at + size) for at, size in zip(starts, self.sizes, strict=True))


Boxes = tuple[Box, ...]


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours in each dimension of a contiguous tensor."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def whole(shape: Sequence[int]) -> Boxes:
    """The single box that is the whole tensor."""
    return (Box((0,) * len(shape), tuple(shape)),)


def slab(shape: Sequence[int], dimension: int, start: int, size: int) -> Boxes:
    """The box of `size` indices of one dimension, from `start` on, and all of the others."""
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dimension], sizes[dimension] = start, size
    return (Box(tuple(offsets), tuple(sizes)),)


def boxes_of_range(shape: Sequence[int], start: int, count: int) -> Boxes:
    """The boxes that make up `count` elements of the flattened tensor, from element `start` on."""
    if not count:
        return ()
    if len(shape) < 2:
        return (Box((start,), (count,)),) if shape else whole(shape)
    row = math.prod(shape[1:])
    first, last = start // row, (start + count - 1) // row
    if first == last:
        return _in_row(shape, first, start - first * row, count)
    head = start - first * row
    tail = start + count - last * row
    boxes: list[Box] = []
    if head:
        boxes += _in_row(shape, first, head, row - head)
        first += 1
    stop = last if tail < row else last + 1
    if stop > first:
        boxes += slab(shape, 0, first, stop - first)
    if tail < row:
        boxes += _in_row(shape, last, 0, tail)
    return tuple(boxes)


def _in_row(shape: Sequence[int], index: int, start: int, count: int) -> Boxes:
    inner = boxes_of_range(shape[1:], start, count)
    return tuple(Box((index, *box.offsets), (1, *box.sizes)) for box in inner)


def overlap(one: Box, other: Box) -> Box | None:
    """The elements in both boxes; None if there are none."""
    offsets, sizes = [], []
    for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        offsets.append(low)
        sizes.append(high - low)
    return Box(tuple(offsets), tuple(sizes))


def runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """(first element, count) of each contiguous run of the flattened tensor that the box consists of."""
    inner = len(shape)
    while inner and box.sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    cut = max(inner - 1, 0)  # the dimensions from `cut` on make up one run
    strides = row_major_strides(shape)
    count = math.prod(box.sizes[cut:])
    within = sum(o * s for o, s in zip(box.offsets[cut:], strides[cut:], strict=True))
    for indices in product(
        *(range(o, o + n) for o, n in zip(box.offsets[:cut], box.sizes[:cut], strict=True))
    ):
        yield within + sum(i * s for i, s in zip(indices, strides[:cut], strict=True)), count


def fit(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether every box has the tensor's dimensions and lies within it."""
    return all(
        len(box.offsets) == len(box.sizes) == len(shape)
        and all(o >= 0 and n >= 0 for o, n in zip(*box, strict=True))
        and all(o + n <= size for o, n, size in zip(*box, shape, strict=True))
        for box in boxes
    )


def make_up(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes contain every element of the tensor exactly once.

    In each dimension the boxes of one mesh have intervals that are equal or disjoint; so do ZeRO's ranges.
    Boxes of any other pattern are refused.
    """
    return _make_up(shape, [box for box in boxes if box.volume], 0)


def _make_up(shape: Sequence[int], boxes: list[Box], dimension: int) -> bool:
    if dimension == len(shape):
        return len(boxes) == 1
    groups: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        groups.setdefault((box.offsets[dimension], box.sizes[dimension]), []).append(box)
    at = 0
    for (offset, size), group in sorted(groups.items()):
        if offset != at or not _make_up(shape, group, dimension + 1):
            return False
        at += size
    return at == shape[dimension]
