"""Loss over the validation rows, weighted as in training: token by token or sample by sample."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from toolkit.data.rows import Rows
from toolkit.plan.model import Plan
from toolkit.plan.steps import share
from toolkit.train.agreement import any_rank
from toolkit.train.batches import micro_batch_tensors
from toolkit.train.engines import Engine
from toolkit.train.watch import Watch

FORWARDS_PER_LOOK = 8
"""After so many forwards the ranks look whether one of them was asked to stop."""


class Evaluator:
    """Runs every `evaluation.every_steps`; every rank reads its share, the result is the same on all."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan, self._engine = plan, engine
        if plan.recipe.evaluation:
            assert plan.data.cache
            self._rows = Rows(Path(plan.data.cache), "validation")

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this optimizer step ends with an evaluation."""
        spec = self._plan.recipe.evaluation
        return spec is not None and (last or step % spec.every_steps == 0)

    def run(self, watch: Watch) -> dict[str, float] | None:
        """`eval/loss` in nats, and for classification `eval/accuracy`, equal on every rank.

        None when a rank was asked to stop meanwhile: the whole is to be done again.
        """
        spec, recipe = self._plan.recipe.evaluation, self._plan.recipe
        assert spec and spec.per_device
        self._engine.agree_on_buffers()
        by_sample = recipe.batch.weighting == "sample"
        sums = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        places = share(len(self._rows), spec.per_device, self._plan.batch.gpus, dist.get_rank())
        for number, (start, stop) in enumerate(places):
            watch.at(f"evaluation, micro-batch {number + 1} of {len(places)}")
            if number % FORWARDS_PER_LOOK == 0 and any_rank(
                watch.stop_asked(), self._engine.device
            ):
                return None
            indices = np.arange(start, stop) if stop > start else np.zeros(1, dtype=np.int64)
            tensors = micro_batch_tensors(self._rows, indices, by_sample, dummy=stop == start)
            sums += self._engine.evaluate(tensors).double()
        dist.all_reduce(sums)
        dist.broadcast(sums, src=0)
        total, right = sums.tolist()
        weight = len(self._rows) if by_sample else int(self._rows.counts.sum())
        result = {"eval/loss": total / weight}
        if recipe.data.task == "classification":
            result["eval/accuracy"] = right / len(self._rows)
        return result
