"""Loading: every rank checks its share of the newest checkpoint, then all read it, or fall back."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from toolkit.checkpoint import shelf
from toolkit.checkpoint.manifest import read_entries, read_manifest, shard_name, verify
from toolkit.checkpoint.state import TrainState
from toolkit.errors import CheckpointError
from toolkit.train.engines.base import Piece


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load (None: begin anew), and the names under which bad ones were kept."""

    path: Path | None
    state: TrainState
    has_older: bool
    set_aside: list[str]


def choose(folder: Path) -> Choice:
    """The newest sound checkpoint; every rank calls it, verifies its share, and gets the same.

    CheckpointError where there were checkpoints and none is sound, or the folder itself is gone: to
    begin anew in silence would lose what metrics.jsonl still tells.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    set_aside: list[str] = []
    while True:
        shared: list[Any] = [None, set_aside]
        if rank == 0 and folder.is_dir():
            shared[0] = [path.name for path in shelf.find_checkpoints(folder)]
        dist.broadcast_object_list(shared, src=0)
        names, set_aside = shared
        if names is None:
            raise CheckpointError(f"{folder}: it is gone. Nearest: put it back, or run anew")
        if not names:
            if set_aside:
                raise CheckpointError(
                    f"{folder}: no checkpoint is sound; they are kept as {', '.join(set_aside)}. "
                    "Nearest: put a sound copy in their place, or run anew"
                )
            return Choice(None, TrainState(), False, [])
        path = folder / names[-1]
        state, error = TrainState(), ""
        try:
            ranks = read_manifest(path)["ranks"]
            state = verify(path, range(rank, ranks, world))
        except CheckpointError as problem:
            error = str(problem)
        errors: list[str] = [""] * world
        dist.all_gather_object(errors, error)
        problem_found = next(filter(None, errors), "")
        if not problem_found:
            return Choice(path, state, len(names) > 1, set_aside)
        if rank == 0:
            aside = shelf.set_aside(path).name
            set_aside = [*set_aside, aside]
            print(f"{problem_found}; kept as {aside}, falling back to the one before", flush=True)


def load(path: Path, pieces: dict[str, Piece]) -> None:
    """Fill this rank's tensors from a verified checkpoint, whatever split or engine wrote it."""
    ranks = read_manifest(path)["ranks"]
    stored: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for rank in range(ranks):
        for name, entry in read_entries(path, rank).items():
            stored.setdefault(name, []).append((rank, entry))
    missing = sorted(set(pieces) ^ set(stored))
    if missing:
        side = "the checkpoint" if missing[0] in pieces else "this model"
        raise CheckpointError(f"{path}: {len(missing)} tensors differ; {side} lacks {missing[0]}")
    with contextlib.ExitStack() as stack:
        files = {
            rank: stack.enter_context(safe_open(path / shard_name(rank), framework="pt"))
            for rank in range(ranks)
        }
        for name, piece in pieces.items():
            _fill(piece, name, stored[name], files)


@torch.no_grad()
def _fill(piece: Piece, name: str, parts: list[tuple[int, dict[str, Any]]], files: Any) -> None:
    shape = tuple(parts[0][1]["shape"])
    if shape != piece.shape:
        raise CheckpointError(f"tensor {name}: {list(shape)} saved, {list(piece.shape)} here")
    target = piece.tensor.contiguous().view(-1)
    end = piece.start + target.numel()
    for rank, entry in parts:
        stored, first = files[rank].get_slice(name), entry["start"]
        low, high = max(piece.start, first), min(end, first + stored.get_shape()[0])
        if low < high:
            target[low - piece.start : high - piece.start].copy_(stored[low - first : high - first])
    if not piece.tensor.is_contiguous():
        piece.tensor.copy_(target.view(piece.tensor.shape))
