"""Parts of tensors as boxes: ranges become boxes, and boxes cover a tensor exactly once or are refused."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from drumline.checkpoint.boxes import Box, Boxes, boxes_of_range, make_up, runs
from drumline.train.loader import copy_overlap

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Boxes]]:
    """A shape, and its flattened elements cut into ranges, as ZeRO does."""
    shape = draw(SHAPES)
    number = math.prod(shape)
    cuts = sorted(draw(st.lists(st.integers(0, number), max_size=4)))
    edges = [0, *cuts, number]
    return shape, [boxes_of_range(shape, a, b - a) for a, b in itertools.pairwise(edges)]


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Boxes]:
    """The boxes of a mesh: every dimension cut into intervals."""
    boxes = [Box((), ())]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        spans = list(itertools.pairwise(cuts))
        boxes = [
            Box((*box.offsets, low), (*box.sizes, high - low))
            for box in boxes
            for low, high in spans
        ]
    return [(box,) for box in boxes]


def elements(shape: tuple[int, ...], boxes: Boxes) -> list[int]:
    """The flattened indices of the boxes, by indexing an array of them."""
    number = torch.arange(math.prod(shape)).view(shape)
    cut = [
        number[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1)
        for box in boxes
    ]
    return torch.cat(cut).tolist() if cut else []


@given(ranges())
def test_a_range_is_few_boxes_with_its_elements_in_order(
    cut: tuple[tuple[int, ...], list[Boxes]],
) -> None:
    """At most 2·ndim − 1 of them, and their runs are the range."""
    shape, parts = cut
    at = 0
    for boxes in parts:
        found = elements(shape, boxes)
        assert found == list(range(at, at + len(found)))
        assert [i for box in boxes for a, n in runs(shape, box) for i in range(a, a + n)] == found
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        at += len(found)
    assert at == math.prod(shape)


@given(st.data())
def test_parts_of_a_mesh_make_up_the_tensor_and_nothing_less_or_more(data: st.DataObject) -> None:
    """A grid and a list of ranges cover it; without one of the boxes, or with one twice, they do not."""
    shape, parts = data.draw(ranges())
    if data.draw(st.booleans()):
        parts = data.draw(grids(shape))
    boxes = [box for part in parts for box in part if box.volume]
    assert make_up(shape, boxes)
    assert not make_up(shape, boxes[1:])
    assert not make_up(shape, [*boxes, boxes[0]])


@given(st.data())
def test_any_parts_are_filled_from_any_others(data: st.DataObject) -> None:
    """Saved as a grid or as ranges, read as another grid: every element arrives, bit for bit."""
    shape, saved = data.draw(ranges())
    if data.draw(st.booleans()):
        saved = data.draw(grids(shape))
    for (wanted,) in data.draw(grids(shape)):
        target = torch.full(wanted.sizes, -1)
        for boxes in saved:
            copy_overlap(torch.tensor(elements(shape, boxes)), boxes, target, (wanted,))
        assert target.reshape(-1).tolist() == elements(shape, (wanted,))
