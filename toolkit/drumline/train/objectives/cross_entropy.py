"""Cross-entropy of every token, or of one class per row."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from drumline.data.tasks.base import IGNORED
from drumline.memory.load import CHUNK_TOKENS
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, Sums, at_least_fp32, model_inputs


def build(recipe: Recipe) -> Objective:
    """Build the cross-entropy of tokens or of classes, by the targets of the recipe's task."""
    if recipe.data.facts.is_per_token:
        return TokenCrossEntropy(recipe.loss.chunked)
    return ClassCrossEntropy()


class TokenCrossEntropy(Objective):
    """Σ weight × cross-entropy of each counted token; `chunked` never holds all logits at once."""

    def __init__(self, chunked: bool = False) -> None:
        self._chunked = chunked

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, int64 [n, L], under the model's logits [n, L, V]."""
        if self._chunked:
            return Sums(_chunked_sum(model, batch))
        logits = model_inputs(model, batch).logits
        return Sums(token_loss_sum(logits, batch["targets"], batch["weights"]))


class ClassCrossEntropy(Objective):
    """Σ weight × cross-entropy of each row's class; reports the accuracy."""

    metrics = ("accuracy",)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, int64 [n], under the model's logits [n, C]."""
        output = model_inputs(model, batch)
        logits = at_least_fp32(output if isinstance(output, Tensor) else output.logits)
        targets, weights = batch["targets"], batch["weights"]
        losses = functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        right = (logits.argmax(dim=-1) == targets).sum()
        return Sums((losses * weights).sum(), {"accuracy": (right, (targets != IGNORED).sum())})


def token_loss_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ weight × cross-entropy over counted tokens: logits [n, L, V], targets [n, L], weights [n].

    A target of -100 adds exactly zero, to the value and to every gradient.
    """
    losses = functional.cross_entropy(
        at_least_fp32(logits).flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    )
    return (losses.view_as(targets) * weights.unsqueeze(1)).sum()


def _chunked_sum(model: Any, batch: Batch) -> Tensor:
    """`token_loss_sum` over chunks of tokens, whose logits are recomputed in the backward."""
    hidden = model_inputs(model.base_model, batch).last_hidden_state
    head = model.get_output_embeddings()
    rows = max(1, CHUNK_TOKENS // hidden.shape[0])
    total = batch["weights"].new_zeros(())
    for start in range(0, hidden.shape[1], rows):
        part = slice(start, start + rows)
        total = total + checkpoint(
            lambda h, t, w: token_loss_sum(head(h), t, w),
            hidden[:, part],
            batch["targets"][:, part],
            batch["weights"],
            use_reentrant=False,
        )
    return total
