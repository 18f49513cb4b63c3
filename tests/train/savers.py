"""Saving as several ranks would, each in its own thread, voting through a store in memory."""

import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from toolkit.checkpoint.manifest import checkpoint_name
from toolkit.checkpoint.state import TrainState
from toolkit.recipe.schema import Checkpoint
from toolkit.train.engines.base import Piece
from toolkit.train.saver import Saver
from toolkit.train.votes import Votes

SHAPES = {"model.a": (7, 3), "model.b": (5,), "optimizer.a.step": (), "model.c": (2, 2, 2)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """The whole state of a small model, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.b"] = made["model.b"].to(torch.bfloat16)
    return made


def pieces(
    whole: dict[str, torch.Tensor], rank: int, world: int, sharded: bool
) -> dict[str, Piece]:
    """A rank's parts: chunks of the first dimension, or whole tensors dealt round."""
    result = {}
    for number, (name, tensor) in enumerate(whole.items()):
        if sharded and tensor.ndim:
            size = -(-tensor.shape[0] // world)
            start = min(tensor.shape[0], rank * size)
            part = tensor[start : start + size].clone()
            first = start * math.prod(tensor.shape[1:])
            result[name] = Piece(part, tuple(tensor.shape), first, part.numel() > 0)
        else:
            result[name] = Piece(tensor.clone(), tuple(tensor.shape), 0, number % world == rank)
    return result


def one_saver(folder: Path, **spec: Any) -> Saver:
    """The saver of a run with one rank."""
    return Saver(folder, Checkpoint(**spec), Votes(HashStore(), "run-0", 0, 1, 5.0), 0)


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
    timeout_s = spec.pop("timeout_s", 5.0)
    store = HashStore()
    errors: list[BaseException | None] = [None] * world

    def work(rank: int) -> None:
        try:
            votes = Votes(store, "run-0", rank, world, timeout_s)
            saver = Saver(folder, Checkpoint(**{"keep_last": 99, **spec}), votes, rank)
            saver.save(pieces(tensors(step), rank, world, sharded), TrainState(step=step))
            saver.wait()
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
