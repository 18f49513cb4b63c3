"""Cross-entropy of every token, or of one class per row."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from drumline.data.tasks.base import IGNORED
from drumline.memory.load import chunks_of
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, Sums, at_least_fp32, model_inputs
from drumline.train.objectives.entities import entity_f1


def build(recipe: Recipe) -> Objective:
    """Build the cross-entropy of tokens or of classes, by the targets of the recipe's task."""
    smoothing = recipe.loss.label_smoothing
    if not recipe.data.facts.is_per_token:
        return ClassCrossEntropy(smoothing)
    if not recipe.data.facts.is_shifted:
        return LabelCrossEntropy(recipe)
    if not recipe.loss.chunked:
        return TokenCrossEntropy(0, smoothing, recipe.loss.z_loss)
    length = recipe.data.sequence_length
    assert length and recipe.batch.per_device
    chunks = chunks_of(recipe.batch.per_device, length)
    return TokenCrossEntropy(chunks, smoothing, recipe.loss.z_loss)


class TokenCrossEntropy(Objective):
    """Σ weight × cross-entropy of each counted token, with the logits of one of so many `chunks` at a time.

    The number does not depend on the micro-batch, because under ZeRO-3 all ranks gather the head for each.
    `smoothing`: of the targets, and `z_loss`: see `token_loss_sum`; both while the model trains.
    `loss_of_logits`: that function, or it compiled.
    """

    loss_of_logits: Callable[..., Tensor]

    def __init__(self, chunks: int = 0, smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self._chunks, self._added = chunks, (smoothing, z_loss)
        self.loss_of_logits = token_loss_sum

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, int64 [n, L], under the model's logits [n, L, V]."""
        smoothing, z_loss = self._added if model.training else (0.0, 0.0)
        by_row = "sources" in batch
        found = model_loss_sum(
            model, batch, self._chunks, smoothing, z_loss, by_row, self.loss_of_logits
        )
        return Sums(found.sum(), rows=found) if by_row else Sums(found)


class LabelCrossEntropy(Objective):
    """Σ weight × cross-entropy of each token that has a label, which is not the token after it.

    Evaluations report the accuracy of these tokens and, where classes are called B-… and I-…, F1 of entities.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.metrics = recipe.data.metrics
        self._names = recipe.data.label_names or []
        self._added = (recipe.loss.label_smoothing, recipe.loss.z_loss)
        self._decodes = recipe.data.facts.head == "seq2seq"

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, int64 [n, L], under the model's logits [n, L, C]."""
        smoothing, z_loss = self._added if model.training else (0.0, 0.0)
        targets, by_row = batch["targets"], "sources" in batch
        inputs = with_decoder_inputs(model, batch) if self._decodes else batch
        logits = model_inputs(model, inputs).logits
        losses = token_loss_sum(logits, targets, batch["weights"], smoothing, z_loss, by_row)
        nothing = losses.new_zeros(())
        metrics = dict.fromkeys(self.metrics, (nothing, nothing))
        if not model.training:
            said, counted = logits.argmax(dim=-1), targets != IGNORED
            metrics["accuracy"] = ((said == targets).sum(), counted.sum())
            if "f1" in self.metrics:
                metrics["f1"] = entity_f1(said, targets, self._names)
        return Sums(losses.sum() if by_row else losses, metrics, losses if by_row else None)


def with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """The batch with decoder_input_ids: the targets after a start token, each without the last one."""
    targets = batch["targets"]
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=targets)
    else:
        start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
        shifted = targets.roll(1, dims=1)
        shifted[:, 0] = start
        shifted = shifted.masked_fill(shifted == IGNORED, pad)
    return {**batch, "decoder_input_ids": shifted}


class ClassCrossEntropy(Objective):
    """Σ weight × cross-entropy of each row's class; reports the accuracy."""

    metrics = ("accuracy",)

    def __init__(self, smoothing: float = 0.0) -> None:
        self._smoothing = smoothing

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `targets`, int64 [n], under the model's logits [n, C]."""
        output = model_inputs(model, batch)
        logits = at_least_fp32(output if isinstance(output, Tensor) else output.logits)
        targets, weights = batch["targets"], batch["weights"]
        losses = functional.cross_entropy(
            logits,
            targets,
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=self._smoothing if model.training else 0.0,
        )
        right = (logits.argmax(dim=-1) == targets).sum()
        weighted = losses * weights
        accuracy = {"accuracy": (right, (targets != IGNORED).sum())}
        return Sums(weighted.sum(), accuracy, weighted if "sources" in batch else None)


def model_loss_sum(
    model: nn.Module,
    batch: Batch,
    chunks: int = 0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    by_row: bool = False,
    loss_of_logits: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`token_loss_sum` of a model's logits, of one of so many chunks of them at a time, or of all (0).

    `loss_of_logits`: that function compiled.
    """
    of_logits = loss_of_logits or token_loss_sum
    if chunks:
        return _chunked_sum(model, batch, chunks, (smoothing, z_loss, by_row), of_logits)
    logits = model_inputs(model, batch).logits
    return of_logits(logits, batch["targets"], batch["weights"], smoothing, z_loss, by_row)


def token_loss_sum(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    by_row: bool = False,
) -> Tensor:
    """Σ weight × cross-entropy over counted tokens: logits [n, L, V], targets [n, L], weights [n].

    Returns [], or `by_row` the sums of the rows, [n].

    A target of -100 adds exactly zero, to the value and to every gradient. `z_loss` × log² Σ exp(logits) is
    added to each (arXiv 2204.02311); it is not for smoothed targets.
    """
    wide, chosen = at_least_fp32(logits).flatten(0, 1), targets.flatten()
    losses = functional.cross_entropy(
        wide, chosen, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
    )
    if z_loss:
        # log Σ exp is the loss plus the target's logit: without another tensor as large as the logits
        own = wide.gather(1, chosen.clamp_min(0).unsqueeze(1)).squeeze(1)
        denominator = (losses + own).masked_fill(chosen == IGNORED, 0.0)
        losses = losses + z_loss * denominator.square()
    weighted = losses.view_as(targets) * weights.unsqueeze(1)
    return weighted.sum(dim=1) if by_row else weighted.sum()


def _chunked_sum(
    model: Any,
    batch: Batch,
    chunks: int,
    added: tuple[float, float, bool],
    of_logits: Callable[..., Tensor],
) -> Tensor:
    """`token_loss_sum` over chunks of tokens, some of them empty, whose logits the backward recomputes."""
    hidden = model_inputs(model.base_model, batch).last_hidden_state
    head = model.get_output_embeddings()
    total = batch["weights"].new_zeros(len(batch["weights"]) if added[-1] else ())
    pieces = (tensor.tensor_split(chunks, dim=1) for tensor in (hidden, batch["targets"]))
    for part, targets in zip(*pieces, strict=True):
        total = total + checkpoint(
            lambda h, t, w: of_logits(head(h), t, w, *added),
            part,
            targets,
            batch["weights"],
            use_reentrant=False,
        )
    return total
