"""What an optimizer step processes: tokens and FLOPs, by the lengths of the rows. Pure."""

import itertools
from collections.abc import Sequence

from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import flops_per_sample, held_parameters, trained_parameters
from drumline.plan.batch import Split
from drumline.plan.model import Cost, mean_of_quantiles
from drumline.plan.optimizers import frozen_bytes, saved_bytes
from drumline.recipe.schema import Recipe

_GROUPS = 10
"""FLOPs grow with the square of a row's length at most, so few groups of rows give their mean."""

_LOADED_BYTES_PER_S = 250e6
"""Bytes of weight files that are read, cast and handed out in a second by two ranks on two shared cores, from
the page cache (benchmarks/load.py)."""


def tokens_per_step(recipe: Recipe, split: Split, lengths: Sequence[int] | None) -> int | None:
    """Tokens of a step without padding; `lengths`: of the rows at 0 %, 1 %, … 100 %, where they differ.

    A row that was not counted has data.sequence_length tokens; None where that is not stated either.
    """
    length = mean_of_quantiles(lengths) if lengths else recipe.data.sequence_length
    return round(split.effective * recipe.objective.facts.sequences * length) if length else None


def cost_of_step(
    recipe: Recipe,
    split: Split,
    shape: ModelShape | None,
    lengths: Sequence[int],
    weights_bytes: int | None,
) -> Cost:
    """Parameters, FLOPs of one optimizer step on all ranks, bytes of one checkpoint and of the weights.

    `lengths`: as in `tokens_per_step`; a single one is that of every row, none: it is not known.
    """
    seconds = None if weights_bytes is None else weights_bytes / _LOADED_BYTES_PER_S
    if shape is None:
        return Cost(None, None, None, weights_bytes, seconds)
    flops = None
    if lengths:
        flops = _mean_flops(recipe, shape, lengths)
    elif shape.patches:
        flops = _flops_per_row(recipe, shape, None)
    return Cost(
        parameters=held_parameters(shape),
        flops_per_step=None if flops is None else split.effective * flops,
        checkpoint_bytes=saved_bytes(recipe, shape),
        frozen_bytes=frozen_bytes(recipe, shape),
        weights_bytes=weights_bytes,
        load_seconds=seconds,
        trained=trained_parameters(shape),
    )


def _mean_flops(recipe: Recipe, shape: ModelShape, lengths: Sequence[int]) -> int:
    if len(set(lengths)) == 1:
        return _flops_per_row(recipe, shape, lengths[0])
    last = len(lengths) - 1
    edges = [last * group // _GROUPS for group in range(_GROUPS + 1)]
    total = sum(
        (end - begin)
        * _flops_per_row(recipe, shape, round(mean_of_quantiles(lengths[begin : end + 1])))
        for begin, end in itertools.pairwise(edges)
        if end > begin
    )
    return round(total / last)


def _flops_per_row(recipe: Recipe, shape: ModelShape, length: int | None) -> int:
    """FLOPs of forward and backward of a row, and of what is read of it without a gradient in each step."""
    facts = recipe.objective.facts
    forwards = facts.baseline_sequences
    if recipe.objective.reference == "adapter_off":
        forwards += facts.sequences + facts.baseline_sequences
    one_forward = shape.flops_per_sample(length) // 3  # as backward takes twice as many
    return facts.sequences * flops_per_sample(shape, length) + forwards * one_forward
