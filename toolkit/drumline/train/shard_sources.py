"""Works out which rank reads what from which file of a checkpoint, whatever split it was saved under.

The layers of a model are split alike, and so are their optimizer's moments. What ranks say of their files,
and of what they need, is therefore grouped by shape and part before it is sent, and each overlap is searched
once.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from drumline.checkpoint.boxes import Boxes, overlap
from drumline.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """Part of a tensor in a file of the checkpoint: the elements of `boxes`, box after box."""

    file: str
    boxes: Boxes


Sources = dict[str, list[Source]]
Shape = tuple[int, ...]
Need = tuple[Shape, Boxes]
"""What a rank reads of a tensor: the global shape, and its part."""


@dataclass(frozen=True)
class Group:
    """Tensors of one global shape of which `file` holds, or a rank needs, the same part."""

    shape: Shape
    boxes: Boxes
    file: str
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What a rank tells rank 0: what lies in the manifests that it parsed, and what it needs itself.

    `names`: of rank 0, all tensors of the model.
    """

    saved: list[Group]
    needed: list[Group]
    names: list[str]


def grouped(parts: Iterable[tuple[str, Shape, Boxes, str]]) -> list[Group]:
    """Parts (name, global shape, boxes, file) by all but their names."""
    groups: dict[tuple[Shape, Boxes, str], Group] = {}
    for name, shape, boxes, file in parts:
        key = shape, boxes, file
        if key not in groups:
            groups[key] = Group(*key)
        groups[key].names.append(name)
    return list(groups.values())


def own_parts(own: dict[str, Need], entries: dict[str, dict[str, Any]]) -> Sources:
    """The sources of those tensors of which this rank's own manifest has exactly the part that it needs."""
    return {
        name: [Source(entry["file"], entry["boxes"])]
        for name, (shape, boxes) in own.items()
        if (entry := entries.get(name))
        and tuple(entry["shape"]) == shape
        and tuple(entry["boxes"]) == tuple(boxes)
    }


def share_out(path: Path, everyone: Sequence[Told], is_part: bool) -> list[Sources]:
    """For each rank, the sources of its tensors; CheckpointError where names or shapes differ.

    `is_part`: the checkpoint holds more tensors than the model.
    """
    groups = [group for told in everyone for group in told.saved]
    stored: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        for name in group.names:
            stored.setdefault(name, []).append(number)
    here = set(everyone[0].names)
    missing = sorted(here - set(stored) if is_part else here ^ set(stored))
    if missing:
        side = "the checkpoint" if missing[0] in here else "this model"
        raise CheckpointError(f"{path}: {len(missing)} tensors differ; {side} lacks {missing[0]}")
    layouts: dict[tuple[int, ...], _Layout] = {}
    for numbers in map(tuple, stored.values()):
        if numbers not in layouts:
            layouts[numbers] = _Layout([groups[number] for number in numbers])
    layout_of = {name: layouts[tuple(numbers)] for name, numbers in stored.items()}
    return [_sources_of(told.needed, layout_of) for told in everyone]


def _sources_of(needed: list[Group], layout_of: dict[str, "_Layout"]) -> Sources:
    sources = {}
    for group in needed:
        found: dict[int, list[Source]] = {}
        for name in group.names:
            layout = layout_of[name]
            if layout.shape != group.shape:
                shapes = f"{list(layout.shape)} saved, {list(group.shape)} here"
                raise CheckpointError(f"tensor {name}: {shapes}")
            if id(layout) not in found:
                found[id(layout)] = layout.sources_of(group.boxes)
            sources[name] = found[id(layout)]
    return sources


class _Layout:
    """Which files hold which parts of a tensor, sorted by their first index in dimension 0."""

    def __init__(self, parts: list[Group]) -> None:
        self.shape = parts[0].shape
        self._groups = parts

    @cached_property
    def _parts(self) -> list[tuple[int, int, Source]]:
        spans = ((*_rows_of(one.boxes), Source(one.file, one.boxes)) for one in self._groups)
        return sorted(spans, key=lambda part: part[:2])

    @cached_property
    def _highest(self) -> list[int]:
        return list(accumulate((high for _, high, _ in self._parts), max))

    def sources_of(self, boxes: Boxes) -> list[Source]:
        """The parts that overlap the needed elements."""
        first, last = _rows_of(boxes)
        found = []
        for low, _, source in self._parts[bisect_right(self._highest, first) :]:
            if low >= last:
                break
            if any(overlap(one, other) for one in source.boxes for other in boxes):
                found.append(source)
        return found


def _rows_of(boxes: Boxes) -> tuple[int, int]:
    """The range of dimension 0 that the boxes lie in; (0, 1) for a tensor without dimensions."""
    spans = [
        (box.offsets[0], box.offsets[0] + box.sizes[0]) if box.sizes else (0, 1) for box in boxes
    ]
    return min((low for low, _ in spans), default=0), max((high for _, high in spans), default=0)
