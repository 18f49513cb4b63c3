"""Forward passes without a gradient over rows that the data ranks share."""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from drumline.data.rows import Rows
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.plan.order import draw_seeds
from drumline.plan.steps import share
from drumline.train.batches import MicroBatches, Request
from drumline.train.engines import Engine
from drumline.train.read_ahead import load
from drumline.train.step_reduce import any_rank
from drumline.train.watch import Watch

FORWARDS_PER_LOOK = 8
"""Forwards between two checks whether any rank was asked to stop."""


class Asked(Exception):  # not an error
    """Any rank was asked to stop; raised on all ranks together."""


def forward_all(
    plan: Plan,
    engine: Engine,
    rows: Rows,
    indices: NDArray[np.int64],
    per_device: int,
    watch: Watch,
    phase: Phase,
    method: str = "sums",
) -> Iterator[tuple[int, int, Tensor]]:
    """What a method of the objective returns for each of this rank's micro-batches of these rows.

    Yields the first and the end of its places in `indices`, equal for a dummy, and the tensor. All ranks make
    as many forwards. Raises `Asked` when any rank was asked to stop.
    """
    mesh = plan.mesh
    places = share(len(indices), per_device, mesh.data_ranks, mesh.data_rank(dist.get_rank()))
    wanted = [
        indices[start:stop] if stop > start else np.zeros(1, dtype=np.int64)
        for start, stop in places
    ]
    requests = [
        Request(chosen, draw_seeds(plan.recipe.seed, chosen, "evaluation"), start == stop)
        for chosen, (start, stop) in zip(wanted, places, strict=True)
    ]
    tensors = load(MicroBatches(plan, rows), requests, plan.recipe.data.workers or 0)
    for number, (start, stop) in enumerate(places):
        watch.enter(phase, f"micro-batch {number + 1} of {len(places)}")
        if number % FORWARDS_PER_LOOK == 0 and any_rank(watch.stop_asked(), engine.device):
            raise Asked
        yield start, stop, engine.evaluate(next(tensors), method)
