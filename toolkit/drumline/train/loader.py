"""Loads a checkpoint that was saved under any split, engine or mesh.

The ranks divide the per-rank manifests among them, each parsed once. Rank 0 works out which rank reads what
from which shard, so a rank opens only the shards that it needs. A tensor that several ranks hold is read by
one of them and broadcast.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from drumline.checkpoint import retention
from drumline.checkpoint.beginning import why_not_anew
from drumline.checkpoint.boxes import Boxes, overlap
from drumline.checkpoint.manifest import read_manifest, verify
from drumline.checkpoint.shards import read_entries
from drumline.checkpoint.state import TrainState
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.train.shard_sources import Need, Source, Sources, Told, grouped, own_parts, share_out
from drumline.train.tensor_shard import TensorShard


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load (None: start from step 0), and the new names of the bad ones set aside."""

    path: Path | None
    state: TrainState
    has_older: bool
    set_aside: list[str]


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
        files: dict[str, Any] = {}
        for name in sorted(shards):
            shard = shards[name]
            if name in own:
                for source in sources[name]:
                    if source.file not in files:
                        file = safe_open(path / source.file, framework="pt")
                        files[source.file] = stack.enter_context(file)
                _read(
                    shard,
                    [(files[source.file].get_slice(name), source) for source in sources[name]],
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
    at_hand = own_parts(own, said.get(rank, {}))
    known = _known_by_all(sorted(shards), own, at_hand)
    told = Told(
        saved=grouped(
            (name, tuple(entry["shape"]), entry["boxes"], entry["file"])
            for entries in said.values()
            for name, entry in entries.items()
            if name not in known
        ),
        needed=grouped(
            (name, shape, boxes, "") for name, (shape, boxes) in own.items() if name not in known
        ),
        names=[name for name in sorted(shards) if name not in known] if rank == 0 else [],
    )
    found = _rest_shared_out(path, told, is_part)
    return {**found, **{name: at_hand[name] for name in own if name in known}}


def _known_by_all(names: list[str], own: dict[str, Need], at_hand: Sources) -> set[str]:
    """Those of these tensors that each rank which reads them has at hand; a collective."""
    has = torch.tensor([name not in own or name in at_hand for name in names], dtype=torch.uint8)
    if _world() > 1 and names:
        dist.all_reduce(has, op=dist.ReduceOp.MIN)
    return {name for name, is_known in zip(names, has.tolist(), strict=True) if is_known}


def _rest_shared_out(path: Path, told: Told, is_part: bool) -> Sources:
    """The sources of what not every rank has at hand; CheckpointError on all ranks on any mismatch."""
    rank, world = _rank(), _world()
    if world == 1:
        return share_out(path, [told], is_part)[0]
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(told, everyone, dst=0)
    answers: list[Any] = [None] * world
    if everyone is not None:
        try:
            answers = share_out(path, everyone, is_part)
        except CheckpointError as error:
            answers = [str(error)] * world
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, answers if rank == 0 else None, src=0)
    if isinstance(mine[0], str):
        raise CheckpointError(mine[0])
    return mine[0]  # type: ignore[no-any-return]


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
