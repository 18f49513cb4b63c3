"""Loads a checkpoint that was saved under any split, engine or mesh.

The ranks divide the per-rank manifests among them, each parsed once. Rank 0 works out which rank reads what
from which shard, so a rank opens only the shards that it needs. A tensor that several ranks hold is read by
one of them and broadcast.
"""

import contextlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from drumline.checkpoint import retention
from drumline.checkpoint.beginning import why_not_anew
from drumline.checkpoint.boxes import Boxes, overlap
from drumline.checkpoint.manifest import (
    read_entries,
    read_manifest,
    shard_name,
    verify,
)
from drumline.checkpoint.state import TrainState
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.train.tensor_shard import TensorShard


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load (None: start from step 0), and the new names of the bad ones set aside."""

    path: Path | None
    state: TrainState
    has_older: bool
    set_aside: list[str]


@dataclass(frozen=True)
class Source:
    """Part of a tensor in the shard file of `rank`: the elements of `boxes`, box after box."""

    rank: int
    boxes: Boxes


Sources = dict[str, list[Source]]
Need = tuple[tuple[int, ...], Boxes]
"""What a rank reads of a tensor: the global shape, and its part."""


def choose(folder: Path, metrics: Path) -> Choice:
    """Choose the newest sound checkpoint, the same on every rank; each rank verifies its share of the shards.

    A damaged one is set aside. A collective. CheckpointError where no checkpoint is sound or the folder is
    gone: silently starting again from step 0 would discard the run that `metrics` (metrics.jsonl) records.
    CheckpointUnreadable where some rank cannot read the newest: nothing is set aside then.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    set_aside: list[str] = []
    while True:
        shared: list[Any] = [[], set_aside, ""]
        if rank == 0:
            shared[0] = [path.name for path in retention.find_checkpoints(folder)]
            shared[2] = why_not_anew(folder, metrics)
        dist.broadcast_object_list(shared, src=0)
        names, set_aside, why_not = shared
        if why_not:
            raise CheckpointError(why_not)
        if not names:
            return Choice(None, TrainState(), has_older=False, set_aside=[])
        path = folder / names[-1]
        state, error = TrainState(), None
        try:
            ranks = read_manifest(path)["ranks"]
            state = verify(path, range(rank, ranks, world))
        except CheckpointError as problem:
            error = problem
        told = (str(error), isinstance(error, CheckpointUnreadable)) if error else None
        errors: list[tuple[str, bool] | None] = [None] * world
        dist.all_gather_object(errors, told)
        unreadable = next((words for words, passes in filter(None, errors) if passes), "")
        if unreadable:
            raise CheckpointUnreadable(unreadable)
        problem_found = next((words for words, _ in filter(None, errors)), "")
        if not problem_found:
            return Choice(path, state, has_older=len(names) > 1, set_aside=set_aside)
        if rank == 0:
            aside = retention.set_aside(path).name
            set_aside = [*set_aside, aside]
            print(f"{problem_found}; kept as {aside}, falling back to the one before", flush=True)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint; a collective, in which each manifest is parsed once."""
    rank, world = _rank(), _world()
    own = {
        name: tuple(entry["shape"])
        for number in range(rank, read_manifest(path)["ranks"], world)
        for name, entry in read_entries(path, number).items()
    }
    everyone: list[dict[str, tuple[int, ...]]] = [own] * world
    if world > 1:
        dist.all_gather_object(everyone, own)
    return {name: shape for found in everyone for name, shape in found.items()}


def load(path: Path, shards: dict[str, TensorShard], is_part: bool = False) -> None:
    """Fill this rank's tensor shards from a verified checkpoint; a collective.

    `is_part`: the checkpoint holds more tensors than these.
    """
    own = {
        name: (shard.shape, shard.boxes)
        for name, shard in shards.items()
        if _reader(name, shard) == _rank()
    }
    sources = _shared_out(path, own, shards, is_part)
    with contextlib.ExitStack() as stack:
        files: dict[int, Any] = {}
        for name in sorted(shards):
            shard = shards[name]
            if name in own:
                for source in sources[name]:
                    if source.rank not in files:
                        file = safe_open(path / shard_name(source.rank), framework="pt")
                        files[source.rank] = stack.enter_context(file)
                _read(
                    shard,
                    [(files[source.rank].get_slice(name), source) for source in sources[name]],
                )
            if shard.copies is not None:
                _broadcast(shard, _reader(name, shard))


def _reader(name: str, shard: TensorShard) -> int:
    """The rank that reads these elements for all that hold them; names spread the work over the ranks."""
    if shard.copies is None:
        return _rank()
    members = dist.get_process_group_ranks(shard.copies)
    return members[sum(name.encode()) % len(members)]


def _shared_out(
    path: Path, own: dict[str, Need], shards: dict[str, TensorShard], is_part: bool
) -> Sources:
    """The sources of each tensor that this rank reads; CheckpointError on all ranks on any mismatch.

    Each per-rank manifest is parsed by one rank. What every rank finds in its own one, as where the split is
    that of the save, needs no more. Of the rest, rank 0 gathers the entries and what each rank needs, and
    scatters the sources.
    """
    rank, world = _rank(), _world()
    ranks = read_manifest(path)["ranks"]
    said = {number: read_entries(path, number) for number in range(rank, ranks, world)}
    at_hand = own_parts(own, said.get(rank, {}), rank)
    known = _known_by_all(sorted(shards), own, at_hand)
    said = {
        number: {name: entry for name, entry in entries.items() if name not in known}
        for number, entries in said.items()
    }
    rest = {name: need for name, need in own.items() if name not in known}
    names = [name for name in sorted(shards) if name not in known]
    found = _rest_shared_out(path, (said, rest, names if rank == 0 else None), is_part)
    return {**found, **{name: at_hand[name] for name in own if name in known}}


def own_parts(own: dict[str, Need], entries: dict[str, dict[str, Any]], rank: int) -> Sources:
    """The sources of those tensors of which this rank's own manifest has exactly the part that it needs."""
    return {
        name: [Source(rank, entry["boxes"])]
        for name, (shape, boxes) in own.items()
        if (entry := entries.get(name))
        and tuple(entry["shape"]) == shape
        and tuple(entry["boxes"]) == tuple(boxes)
    }


def _known_by_all(names: list[str], own: dict[str, Need], at_hand: Sources) -> set[str]:
    """Those of these tensors that each rank which reads them has at hand; a collective."""
    has = torch.tensor([name not in own or name in at_hand for name in names], dtype=torch.uint8)
    if _world() > 1 and names:
        dist.all_reduce(has, op=dist.ReduceOp.MIN)
    return {name for name, is_known in zip(names, has.tolist(), strict=True) if is_known}


def _rest_shared_out(path: Path, told: Any, is_part: bool) -> Sources:
    """The sources of what not every rank has at hand; `told`: entries, needs and, of rank 0, all names."""
    rank, world = _rank(), _world()
    if world == 1:
        return _answers(path, [told], is_part)[0]
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(told, everyone, dst=0)
    answers: list[Any] = [None] * world
    if everyone is not None:
        try:
            answers = _answers(path, everyone, is_part)
        except CheckpointError as error:
            answers = [str(error)] * world
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, answers if rank == 0 else None, src=0)
    if isinstance(mine[0], str):
        raise CheckpointError(mine[0])
    return mine[0]  # type: ignore[no-any-return]


def _answers(path: Path, everyone: list[Any], is_part: bool) -> list[Sources]:
    """For each rank, the sources of its tensors; CheckpointError where names or shapes differ."""
    stored: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for said, _, _ in everyone:
        for number, entries in said.items():
            for name, entry in entries.items():
                stored.setdefault(name, []).append((number, entry))
    here = set(everyone[0][2])
    missing = sorted(here - set(stored) if is_part else here ^ set(stored))
    if missing:
        side = "the checkpoint" if missing[0] in here else "this model"
        raise CheckpointError(f"{path}: {len(missing)} tensors differ; {side} lacks {missing[0]}")
    parts = {name: _StoredParts(name, found) for name, found in stored.items()}
    return [
        {name: parts[name].sources_of(need) for name, need in own.items()} for _, own, _ in everyone
    ]


class _StoredParts:
    """A tensor's parts in a checkpoint, sorted by their first index in dimension 0."""

    def __init__(self, name: str, parts: list[tuple[int, dict[str, Any]]]) -> None:
        self._name, self._shape = name, tuple(parts[0][1]["shape"])
        spans = ((*_rows_of(entry["boxes"]), Source(n, entry["boxes"])) for n, entry in parts)
        self._parts = sorted(spans, key=lambda part: part[:2])
        self._highest = list(accumulate((high for _, high, _ in self._parts), max))

    def sources_of(self, need: Need) -> list[Source]:
        """The parts that overlap the needed elements; CheckpointError where the shapes differ."""
        shape, boxes = need
        if self._shape != shape:
            raise CheckpointError(
                f"tensor {self._name}: {list(self._shape)} saved, {list(shape)} here"
            )
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


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def _read(shard: TensorShard, parts: list[tuple[Any, Source]]) -> None:
    target = shard.tensor.contiguous()
    for stored, source in parts:
        copy_overlap(stored, source.boxes, target, shard.boxes)
    if not shard.tensor.is_contiguous():
        shard.tensor.copy_(target)


@torch.no_grad()
def copy_overlap(stored: Any, boxes: Boxes, target: Tensor, wanted: Boxes) -> None:
    """Copy the elements that two parts of a tensor share.

    `stored`: the elements of `boxes`, one dimension, a tensor or a safetensors slice. `target`: contiguous,
    holds the elements of `wanted`.
    """
    flat = target.view(-1)
    first = 0
    for box in boxes:
        to = 0
        for other in wanted:
            shared = overlap(box, other)
            if shared:
                strides = box.strides
                places = zip(shared.within(box), shared.sizes, strides, strict=True)
                ends = [(cut.start * step, (size - 1) * step) for cut, size, step in places]
                low = first + sum(start for start, _ in ends)
                piece = stored[low : low + sum(length for _, length in ends) + 1]
                view = flat[to : to + other.volume].view(other.sizes)
                view[shared.within(other)].copy_(piece.as_strided(shared.sizes, strides))
            to += other.volume
        first += box.volume


@torch.no_grad()
def _broadcast(shard: TensorShard, source: int) -> None:
    """Send the elements from the rank that read them to all ranks that hold them."""
    value: Tensor = shard.tensor.detach().contiguous()
    dist.broadcast(value, src=source, group=shard.copies)
    if value.data_ptr() != shard.tensor.data_ptr():
        shard.tensor.copy_(value)
