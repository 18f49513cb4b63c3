"""Compares our loss of a row with the one that the model computes itself, by transformers' code alone.

What a model does to its logits, such as scaling or capping them, shows here even where training and its
reference leave it out alike.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from drumline.data.rows import Rows
from drumline.data.tasks.base import IGNORED
from drumline.plan.model import Plan
from drumline.train.batches import Step, micro_batch_tensors
from drumline.train.engines.base import autocast_dtype
from drumline.train.objectives import ObjectiveModule
from drumline.train.objectives.base import model_input_names, model_inputs

_OWN = ("cross_entropy", "mse", "bce")
"""Objectives that models of transformers have themselves."""
_OF_TOKENS = {"input_ids", "position_ids", "mm_token_type_ids", "token_type_ids"}
"""Inputs with a value for each token of a row."""

_ROUNDING = 1e-2
"""Relative distance of two losses of the same logits, in any precision."""


@torch.no_grad()
def compare_with_own_loss(
    plan: Plan, rows: Rows, module: ObjectiveModule, step: Step, device: torch.device
) -> dict[str, float] | None:
    """Mean losses over the first row of the step that has two targets, ours and theirs, and their distance.

    None where the model has no loss of its own for these rows: it is no model of transformers, the objective
    is one that they lack, or training counts more than the cross-entropy.
    """
    from transformers import PreTrainedModel

    is_other = plan.recipe.objective.name not in _OWN or not plan.recipe.loss.is_plain
    if not isinstance(module.model, PreTrainedModel) or is_other:
        return None
    dtype, facts = autocast_dtype(plan), plan.recipe.data.facts
    for place in range(step.samples):
        which = slice(place, place + 1)
        one = micro_batch_tensors(rows, step.indices[which], True, False, step.seeds[which])
        batch = {name: tensor.to(device) for name, tensor in one.items()}
        pair = _as_both_take_it(batch, facts.is_shifted, plan.recipe.data.is_chat_with_images)
        if pair is None:
            continue
        mine, theirs = pair
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            output = model_inputs(module.model, theirs)
            if output.loss is None:
                return None
            if facts.is_shifted and not _shifts_labels(output, theirs["labels"]):
                own = {"input_ids": mine["input_ids"], "labels": mine["targets"]}
                output = model_inputs(module.model, own)
            total = module.objective.sums(module.model, mine).loss
        counted = int((mine["targets"] != IGNORED).sum()) if facts.is_per_token else 1
        found = float(total) / counted
        wanted = float(output.loss)
        error = abs(found - wanted) / abs(wanted)
        return {"ours": found, "theirs": wanted, "relative_error": error}
    return None


def _shifts_labels(output: Any, labels: Tensor) -> bool:
    """Whether this loss is of the next token's label, as of most models; BART takes the token's own."""
    logits, following = output.logits[:, :-1].float(), labels[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED)
    return abs(float(loss) - float(output.loss)) <= _ROUNDING * abs(float(loss))


def _as_both_take_it(
    batch: dict[str, Tensor], is_shifted: bool, has_images: bool
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The row for our objective with weights of one, and for transformers with its labels; None if too short.

    Where the next token's label is a token's target, the row's last target is left out.
    """
    ones = torch.ones_like(batch["weights"])
    inputs = {name: batch[name] for name in model_input_names(batch)}
    targets = batch["targets"]
    if not is_shifted:
        return {**batch, "weights": ones}, {**inputs, "labels": targets}
    if not (set(inputs) <= _OF_TOKENS or has_images) or not (targets[:, :-1] != IGNORED).any():
        return None
    labels = torch.full_like(targets, IGNORED)
    labels[:, 1:] = targets[:, :-1]
    cut = {name: v[:, :-1] if name in _OF_TOKENS else v for name, v in inputs.items()}
    mine = {**cut, "targets": targets[:, :-1], "weights": ones}
    return mine, {**inputs, "labels": labels}
