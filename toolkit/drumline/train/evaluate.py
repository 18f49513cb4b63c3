"""Evaluates the objective on the rows for it, weighted as in training: per token or per sample."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from drumline.data.rows import Rows
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.plan.steps import is_due, share
from drumline.recipe.data_section import ALONE
from drumline.train.batches import micro_batch_tensors, open_rows
from drumline.train.engines import Engine
from drumline.train.step_reduce import any_rank, is_shared
from drumline.train.watch import Watch

FORWARDS_PER_LOOK = 8
"""Forwards between two checks whether any rank was asked to stop."""


@dataclass(frozen=True)
class _Sums:
    """Sums of a set over all ranks: loss, weight, and numerator and denominator of each metric."""

    loss: float
    weight: float
    pairs: list[tuple[float, float]]

    def plus(self, other: "_Sums") -> "_Sums":
        """The sums of both sets."""
        pairs = [(a + c, b + d) for (a, b), (c, d) in zip(self.pairs, other.pairs, strict=True)]
        return _Sums(self.loss + other.loss, self.weight + other.weight, pairs)


class Evaluator:
    """Evaluates at the cadence of `evaluation` and after the last step; data ranks share the rows."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan, self._engine = plan, engine
        self._sets: dict[str, Rows] = {}
        if plan.recipe.evaluation:
            manifest = open_rows(plan, "train").manifest
            parts = manifest.evaluation_parts
            self._sets = {name: open_rows(plan, part) for name, part in parts.items()}

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this optimizer step ends with an evaluation."""
        spec = self._plan.recipe.evaluation
        return spec is not None and (
            last or is_due(step, spec.every_steps, spec.every_epochs, self._plan.clock())
        )

    def run(self, watch: Watch) -> dict[str, float] | None:
        """`eval/loss` in nats, and the objective's metrics as `eval/<name>`; equal on every rank.

        They are of the rows of all sets together; those of a set that has a name are `eval/<set>/loss` and so
        on, and those of the averaged weights `eval/ema/loss`. None when any rank was asked to stop: the
        evaluation must then be repeated in full.
        """
        self._engine.agree_on_buffers()
        found = self._run(watch, "eval")
        spec, ema = self._plan.recipe.ema, self._engine.ema
        if found is None or ema is None or spec is None or not spec.evaluate:
            return found
        with ema.in_place():
            averaged = self._run(watch, "eval/ema")
        return None if averaged is None else found | averaged

    def _run(self, watch: Watch, prefix: str) -> dict[str, float] | None:
        """The metrics of all sets with the weights as they are now, under names with this prefix."""
        found: dict[str, _Sums] = {}
        for name, rows in self._sets.items():
            sums = self._sums(rows, watch)
            if sums is None:
                return None
            found[name] = sums
        first, *others = found.values()
        for other in others:
            first = first.plus(other)
        result = self._metrics(prefix, first)
        for name, sums in found.items():
            if name != ALONE or others:
                result |= self._metrics(f"{prefix}/{name}", sums)
        return result

    def _sums(self, rows: Rows, watch: Watch) -> _Sums | None:
        spec, mesh = self._plan.recipe.evaluation, self._plan.mesh
        assert spec and spec.per_device
        by_sample = self._plan.recipe.batch.weighting == "sample"
        names = self._engine.module.objective.metrics
        sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=self._engine.device)
        data_rank = mesh.data_rank(dist.get_rank())
        places = share(len(rows), spec.per_device, mesh.data_ranks, data_rank)
        for number, (start, stop) in enumerate(places):
            watch.enter(Phase.EVALUATING, f"micro-batch {number + 1} of {len(places)}")
            if number % FORWARDS_PER_LOOK == 0 and any_rank(
                watch.stop_asked(), self._engine.device
            ):
                return None
            indices = np.arange(start, stop) if stop > start else np.zeros(1, dtype=np.int64)
            tensors = micro_batch_tensors(rows, indices, by_sample, dummy=stop == start)
            sums += self._engine.evaluate(tensors).double()
        if is_shared():
            dist.all_reduce(sums)
            dist.broadcast(sums, src=0)
        total, *pairs = sums.tolist()
        weight = len(rows) if by_sample else int(rows.counts.sum())
        return _Sums(total, weight, list(zip(pairs[::2], pairs[1::2], strict=True)))

    def _metrics(self, prefix: str, sums: _Sums) -> dict[str, float]:
        result = {f"{prefix}/loss": sums.loss / sums.weight}
        names = self._engine.module.objective.metrics
        for name, (numerator, denominator) in zip(names, sums.pairs, strict=True):
            result[f"{prefix}/{name}"] = numerator / denominator if denominator else float("nan")
        return result
