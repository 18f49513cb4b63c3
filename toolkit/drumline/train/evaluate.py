"""Evaluates the objective on the rows for it, weighted as in training: per token or per sample."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drumline.data.rows import Rows
from drumline.errors import PlanError
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.plan.steps import is_due
from drumline.recipe.data_section import ALONE
from drumline.train.batches import open_rows
from drumline.train.engines import Engine
from drumline.train.forwards import Asked, forward_all
from drumline.train.objectives.base import baseline_of
from drumline.train.step_reduce import is_shared
from drumline.train.watch import Watch


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
    """Evaluates at the cadence of `evaluation` and after the last step; data ranks share the rows.

    `parts`: the rows of the prepared data that are evaluated, by the names of the parts.
    """

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan, self._engine = plan, engine
        _check_metric(plan, engine.module.objective.metrics)
        self.parts: dict[str, Rows] = {}
        self._sets: dict[str, Rows] = {}
        if plan.recipe.row_evaluation:
            names = open_rows(plan, "train").manifest.evaluation_parts
            self.parts = {part: open_rows(plan, part) for part in names.values()}
            self._sets = {name: self.parts[part] for name, part in names.items()}

    def is_due(self, step: int, last: bool) -> bool:
        """Whether this optimizer step ends with an evaluation."""
        spec = self._plan.recipe.row_evaluation
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
        spec, ema = self._plan.recipe.ema, self._engine.ema
        try:
            found = self._run(watch, "eval")
            if ema is None or spec is None or not spec.evaluate:
                return found
            with ema.in_place():
                return found | self._run(watch, "eval/ema")
        except Asked:
            return None

    def _run(self, watch: Watch, prefix: str) -> dict[str, float]:
        """The metrics of all sets with the weights as they are now, under names with this prefix."""
        found = {name: self._sums(rows, watch) for name, rows in self._sets.items()}
        first, *others = found.values()
        for other in others:
            first = first.plus(other)
        result = self._metrics(prefix, first)
        for name, sums in found.items():
            if name != ALONE or others:
                result |= self._metrics(f"{prefix}/{name}", sums)
        return result

    def _sums(self, rows: Rows, watch: Watch) -> _Sums:
        """The sums of a set; raises `Asked` when any rank was asked to stop."""
        objective = self._engine.module.objective
        baseline = baseline_of(objective)
        if baseline:
            baseline.set_baseline(self._total(rows, watch, "baseline_sums"))
        total, *pairs = self._total(rows, watch, "sums").tolist()
        by_sample = self._plan.recipe.batch.weighting == "sample"
        weight = len(rows) if by_sample else int(rows.counts.sum())
        return _Sums(total, weight, list(zip(pairs[::2], pairs[1::2], strict=True)))

    def _total(self, rows: Rows, watch: Watch, method: str) -> Tensor:
        """Σ over all rows of a set of what a method of the objective returns, float64, on every rank."""
        spec = self._plan.recipe.row_evaluation
        assert spec and spec.per_device
        indices = np.arange(len(rows))
        found = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for _, _, part in forward_all(
            self._plan,
            self._engine,
            rows,
            indices,
            spec.per_device,
            watch,
            Phase.EVALUATING,
            method,
        ):
            found = found + part.double()
        if is_shared():
            dist.all_reduce(found)
            dist.broadcast(found, src=0)
        return found

    def _metrics(self, prefix: str, sums: _Sums) -> dict[str, float]:
        result = {f"{prefix}/loss": sums.loss / sums.weight}
        names = self._engine.module.objective.metrics
        for name, (numerator, denominator) in zip(names, sums.pairs, strict=True):
            result[f"{prefix}/{name}"] = numerator / denominator if denominator else float("nan")
        return result


def _check_metric(plan: Plan, metrics: tuple[str, ...]) -> None:
    """PlanError where early stopping waits for a metric that the project's objective does not report."""
    rule = plan.recipe.early_stopping
    if rule and rule.metric.rpartition("/")[2] not in ("loss", *metrics):
        raise PlanError(
            f"early_stopping.metric: {rule.metric}: {plan.recipe.objective.factory} reports "
            f"{', '.join(('loss', *metrics))}. Nearest: early_stopping.metric=eval/loss"
        )
