"""Saving as several ranks would, each in its own thread, committing through a store in memory."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from drumline.checkpoint.boxes import slab
from drumline.checkpoint.boxes import whole as whole_box
from drumline.checkpoint.manifest import checkpoint_name
from drumline.checkpoint.state import TrainState
from drumline.recipe.schema import Checkpoint
from drumline.train.commit import SaveCommit
from drumline.train.saver import Saver
from drumline.train.tensor_shard import TensorShard

SHAPES = {"model.a": (7, 3), "model.b": (5,), "optimizer.a.step": (), "model.c": (2, 2, 2)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """The whole state of a small model, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.b"] = made["model.b"].to(torch.bfloat16)
    return made


def pieces(
    whole: dict[str, torch.Tensor], rank: int, world: int, sharded: bool, frozen: Sequence[str] = ()
) -> dict[str, TensorShard]:
    """A rank's parts: chunks of the first dimension, or whole tensors dealt round; some need no gradient."""
    result = {}
    for number, (name, tensor) in enumerate(whole.items()):
        if sharded and tensor.ndim:
            size = -(-tensor.shape[0] // world)
            start = min(tensor.shape[0], rank * size)
            part = tensor[start : start + size].clone()
            boxes = slab(tensor.shape, 0, start, len(part))
            result[name] = TensorShard(part, tuple(tensor.shape), boxes, part.numel() > 0)
        else:
            result[name] = TensorShard(
                tensor.clone(), tuple(tensor.shape), whole_box(tensor.shape), number % world == rank
            )
    return {
        name: dataclasses.replace(shard, frozen=name in frozen) for name, shard in result.items()
    }


def one_saver(folder: Path, **spec: Any) -> Saver:
    """The saver of a run with one rank."""
    return Saver(folder, Checkpoint(**spec), SaveCommit(HashStore(), "run-0", 0, 1), 0)


def save(folder: Path, step: int, world: int = 2, sharded: bool = True, **spec: Any) -> Path:
    """Save `tensors(step)`; raises what rank 0 raises when all have learnt the verdict."""
    folder.mkdir(exist_ok=True)
    errors = try_to_save(folder, step, world, sharded, **spec)
    if errors[0]:
        raise errors[0]
    return folder / checkpoint_name(step)


def try_to_save(
    folder: Path, step: int, world: int = 2, sharded: bool = True, **spec: Any
) -> list[BaseException | None]:
    """What each rank's save came to."""
    timeout_s, frozen = spec.pop("timeout_s", 5.0), spec.pop("frozen", ())
    store = HashStore()
    errors: list[BaseException | None] = [None] * world

    def work(rank: int) -> None:
        try:
            commit = SaveCommit(store, "run-0", rank, world)
            saver = Saver(folder, Checkpoint(**{"keep_last": 99, **spec}), commit, rank)
            saver.limit_s = lambda size=None: timeout_s  # type: ignore[method-assign]
            shards = pieces(tensors(step), rank, world, sharded, frozen)
            saver.begin(shards)
            saver.save(shards, TrainState(step=step))
            saver.wait()
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
