"""Runs forward and backward of the longest rows on this machine's CPU, before a job waits in a queue.

What a rank would die of within its first step is found here: shapes that do not fit, ids beyond a table, an
objective or an edit that fails, a loss that is not finite. Where it would take more than about a second it is
left out: ranks run the same pass before their first step.
"""

import math

import numpy as np
import torch

from drumline.data.tasks.base import REFERENCE
from drumline.errors import DrumlineError, PlanError
from drumline.plan.model import Plan
from drumline.plan.order import draw_seeds
from drumline.train.batches import micro_batch_tensors, open_rows
from drumline.train.engines.base import autocast_dtype
from drumline.train.models import ModelBuilder
from drumline.train.objectives import ObjectiveModule, build_objective
from drumline.train.objectives.base import baseline_of
from drumline.train.reference import needs_reference

_MOST_FLOPS = 2e10
"""About a second of one core: 6 × weights × tokens."""
_LEAST_ROWS = 2
"""BatchNorm has no variance of one row."""


def dry_pass(plan: Plan) -> bool:
    """Whether it was run; PlanError says what would fail."""
    recipe, parameters = plan.recipe, plan.cost.parameters
    count = min(_LEAST_ROWS, plan.batch.per_device)
    tokens = count * recipe.objective.facts.sequences * (plan.data.row_tokens or 1)
    is_small = parameters is None or 6.0 * parameters * tokens <= _MOST_FLOPS
    is_loaded_whole = recipe.model.edits and recipe.model.source in ("folder", "hub")
    if not is_small or is_loaded_whole or recipe.model.attention == "flash":
        return False
    rows = open_rows(plan, "train")
    try:
        builder = ModelBuilder(recipe, rows.manifest)  # without storage, but for a factory's model
        if 6.0 * sum(p.numel() for p in builder.model.parameters()) * tokens > _MOST_FLOPS:
            return False
        module = ObjectiveModule(builder.whole(), build_objective(recipe))
        sizes = rows.lengths() if "lengths" in rows.task.columns else rows.counts
        longest = np.argsort(sizes, kind="stable")[-count:].astype(np.int64)
        by_sample = recipe.batch.weighting == "sample"
        if needs_reference(plan):
            rows.attach(REFERENCE, np.zeros((len(rows), 2), dtype=np.float32))
        if baseline := baseline_of(module.objective):
            baseline.set_baseline(torch.zeros(2))
        seeds = draw_seeds(recipe.seed, longest)
        tensors = micro_batch_tensors(rows, longest, by_sample, False, seeds)
        dtype = autocast_dtype(plan)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = module(tensors)[0]
        loss.backward()
    except DrumlineError:
        raise
    except Exception as error:
        told = str(error).strip().splitlines() or [""]
        raise PlanError(
            f"the first step would fail: {type(error).__name__}: {told[0][:300]}. "
            "(The longest rows were tried on this machine's CPU; --debug shows where.)"
        ) from error
    value = float(loss.detach())
    if not math.isfinite(value):
        raise PlanError(
            f"the loss of the longest rows is {value} before the first step. Nearest: look at rows "
            f"{', '.join(f'{row:,}' for row in longest)} of the prepared data, and at the model's weights"
        )
    return True
