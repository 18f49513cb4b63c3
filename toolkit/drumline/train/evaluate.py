"""Evaluates the objective on the validation rows, weighted as in training: per token or per sample."""

import numpy as np
import torch
import torch.distributed as dist

from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.plan.steps import share
from drumline.train.batches import micro_batch_tensors, open_rows
from drumline.train.engines import Engine
from drumline.train.step_reduce import any_rank, is_shared
from drumline.train.watch import Watch

FORWARDS_PER_LOOK = 8
"""Forwards between two checks whether any rank was asked to stop."""


class Evaluator:
    """Evaluates every `evaluation.every_steps` and after the last step; data ranks share the rows."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan, self._engine = plan, engine
        if plan.recipe.evaluation:
            self._rows = open_rows(plan, "validation")

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this optimizer step ends with an evaluation."""
        spec = self._plan.recipe.evaluation
        return spec is not None and (last or step % spec.every_steps == 0)

    def run(self, watch: Watch) -> dict[str, float] | None:
        """`eval/loss` in nats, and the objective's metrics as `eval/<name>`; equal on every rank.

        None when any rank was asked to stop: the evaluation must then be repeated in full.
        """
        spec, mesh = self._plan.recipe.evaluation, self._plan.mesh
        assert spec and spec.per_device
        self._engine.agree_on_buffers()
        by_sample = self._plan.recipe.batch.weighting == "sample"
        names = self._engine.module.objective.metrics
        sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=self._engine.device)
        data_rank = mesh.data_rank(dist.get_rank())
        places = share(len(self._rows), spec.per_device, mesh.data_ranks, data_rank)
        for number, (start, stop) in enumerate(places):
            watch.enter(Phase.EVALUATING, f"micro-batch {number + 1} of {len(places)}")
            if number % FORWARDS_PER_LOOK == 0 and any_rank(
                watch.stop_asked(), self._engine.device
            ):
                return None
            indices = np.arange(start, stop) if stop > start else np.zeros(1, dtype=np.int64)
            tensors = micro_batch_tensors(self._rows, indices, by_sample, dummy=stop == start)
            sums += self._engine.evaluate(tensors).double()
        if is_shared():
            dist.all_reduce(sums)
            dist.broadcast(sums, src=0)
        total, *pairs = sums.tolist()
        weight = len(self._rows) if by_sample else int(self._rows.counts.sum())
        result = {"eval/loss": total / weight}
        for name, numerator, denominator in zip(names, pairs[::2], pairs[1::2], strict=True):
            result[f"eval/{name}"] = numerator / denominator if denominator else float("nan")
        return result
