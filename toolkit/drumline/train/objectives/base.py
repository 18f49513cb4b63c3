"""The interface of all objectives, used by engines, evaluation and verification."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drumline.data.tasks.base import NOT_INPUTS
from drumline.train.models.masks import positions_given

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sums:
    """Undivided sums over a micro-batch, each a float tensor [].

    `loss` in nats: each sample's (or token's) loss times its weight. `metrics`: name -> (numerator,
    denominator), such as correct predictions and predictions; their ratio over all samples is reported.
    `rows`: the part of `loss` of each row, float [n]; only asked for where the batch has `sources`, for the
    loss of each source of a mixture.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: Tensor | None = None


class Objective:
    """A loss to minimise. Subclasses implement `sums`.

    `metrics`: the names that `sums` returns, reported by evaluation as `eval/<name>`. `why_not_additive`:
    empty if the loss of a batch is the sum of its samples' losses, without which the split would change the
    result; else the reason why it is not. `reports_each_step`: training steps report the metrics, too.
    """

    metrics: tuple[str, ...] = ()
    why_not_additive: str = ""
    reports_each_step = False

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Run the model on a micro-batch and sum its losses.

        `batch`: the arrays of the task's `collate` as tensors, and `weights`, float32 [n]: the weight of each
        counted token (or of the class) of a row. A target of -100 must add exactly zero to every sum and
        gradient, because a rank without a sample runs a dummy micro-batch of such targets.
        """
        raise NotImplementedError


class StepBaseline(Protocol):
    """An objective with a number that all losses of a step share, over its whole effective batch."""

    def baseline_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """This micro-batch's part of the sums that the number is made of, float [k]; without a gradient."""

    def set_baseline(self, sums: Tensor) -> None:
        """Take the sums over the whole effective batch, float [k], for the losses that follow."""


def baseline_of(objective: Objective) -> StepBaseline | None:
    """The objective, if its losses share a number."""
    return objective if hasattr(objective, "baseline_sums") else None  # type: ignore[return-value]


class ObjectiveModule(nn.Module):
    """Model and objective in one module, so that DDP and FSDP wrap the whole forward.

    forward(batch, method) -> what this method of the objective returns, by default `sums` as one tensor:
    float [1 + 2·m]: the loss, then numerator and denominator of each of m metrics. Where
    the batch has `sources`, float [n, s] (1 in the column of a row's source, else 0), the losses of the s
    sources follow.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, method: str = "sums") -> Tensor:
        """The sums of this micro-batch, as one tensor, or what another method computes of it."""
        if method != "sums":
            other: Tensor = getattr(self.objective, method)(self.model, batch)
            return other
        found = self.objective.sums(self.model, batch)
        parts = [found.loss]
        for name in self.objective.metrics:
            parts += [value.to(found.loss.dtype) for value in found.metrics[name]]
        whole = torch.stack(parts)
        if found.rows is None:
            return whole
        return torch.cat([whole, found.rows.detach().to(whole.dtype) @ batch["sources"]])


def model_inputs(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a micro-batch: `features` as its first argument, all else by name."""
    inputs = {name: batch[name] for name in model_input_names(batch)}
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if pad and "attention_mask" in inputs and "input_ids" in inputs:
        # A classifier finds the last token of a row by the id of its padding.
        is_padding = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(is_padding, pad)
    first = [inputs.pop("features")] if "features" in inputs else []
    with positions_given("position_ids" in inputs):
        return model(*first, **inputs)


def model_input_names(batch: Batch) -> list[str]:
    """The names of the tensors of a micro-batch that the model is given."""
    return [name for name in batch if name not in NOT_INPUTS]


def at_least_fp32(logits: Tensor) -> Tensor:
    """Cast fp16 and bf16 logits to fp32, which the softmax needs."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
