"""What all objectives of preferences share: log-probabilities of completions, the reference's, and metrics.

Shapes: n rows of a micro-batch. A row that is not counted (all targets ignored) adds exactly zero.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from drumline.data.tasks.base import IGNORED, REFERENCE
from drumline.memory.load import chunks_of
from drumline.recipe.schema import Recipe
from drumline.train.models.adapter import without_adapter
from drumline.train.objectives.base import Batch, Objective, Sums
from drumline.train.objectives.cross_entropy import model_loss_sum

Pair = tuple[Tensor, Tensor]
"""Values of the chosen and of the rejected completions, float [n] each."""


class Preference(Objective):
    """What a preference objective asks of a recipe; `mean`: log-probabilities are means over tokens."""

    reports_each_step = True
    mean = False

    def __init__(self, recipe: Recipe) -> None:
        spec, length = recipe.objective, recipe.data.sequence_length
        assert spec.beta and length and recipe.batch.per_device
        self.beta = spec.beta
        self.metrics = spec.facts.metrics
        self.sft_weight = spec.sft_weight or 0.0
        self._reference = spec.reference
        rows = recipe.batch.per_device * spec.facts.sequences
        self._chunks = chunks_of(rows, length) if recipe.loss.chunked else 0

    def log_probs(self, model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        """Σ over each row's targets of their log-probability, or the mean, float32 [rows]."""
        batch = {"input_ids": ids, "targets": targets, "weights": ids.new_ones(len(ids)).float()}
        sums = -model_loss_sum(model, batch, self._chunks, by_row=True)
        if not self.mean:
            return sums
        return sums / (targets != IGNORED).sum(dim=1).clamp(min=1)

    @torch.no_grad()
    def reference_log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probabilities of the model as it is, float32 [n, 2]: of the two completions of each row."""
        return torch.stack(self._both(model, batch), dim=1)

    def reference(self, model: nn.Module, batch: Batch) -> Pair:
        """The reference's log-probabilities of the two completions of each row."""
        if self._reference != "adapter_off":
            both = batch[REFERENCE]
        else:
            with without_adapter(model), evaluating(model):
                both = self.reference_log_probs(model, batch)
        return both[:, 0], both[:, 1]

    def _both(self, model: nn.Module, batch: Batch) -> Pair:
        raise NotImplementedError


class Pairs(Preference):
    """An objective of pairs. Subclasses implement `losses`; the gradient is that of Σ weight × loss.

    Rewards are β × (log-probability − the reference's).
    """

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of the pairs in `input_ids` and `targets`, int64 [2n, L], the chosen ones first."""
        reference = self.reference(model, batch) if self._reference else None
        tokens = (batch["targets"] != IGNORED).sum(dim=1).chunk(2)
        counted = tokens[0] > 0
        policy = self._both(model, batch)
        # Values that no loss is infinite at, so that the gradient of an ignored row is zero and not NaN.
        chosen, rejected = (value.where(counted, -1.0) for value in policy)
        ratios = (chosen, rejected)
        if reference is not None:
            ratios = (chosen - reference[0], rejected - reference[1])
        losses = self.losses(*ratios)
        if self.sft_weight:
            lengths = 1.0 if self.mean else tokens[0].clamp(min=1)
            losses = losses - self.sft_weight * chosen / lengths
        weighted = losses.masked_fill(~counted, 0.0) * batch["weights"]
        rewards = [(self.beta * ratio.detach()) for ratio in ratios]
        metrics = pair_metrics(rewards, [chosen.detach(), rejected.detach()], counted)
        return Sums(weighted.sum(), metrics, weighted if "sources" in batch else None)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float [n], by its log-probabilities, less the reference's if it has one."""
        raise NotImplementedError

    def _both(self, model: nn.Module, batch: Batch) -> Pair:
        found = self.log_probs(model, batch["input_ids"], batch["targets"])
        chosen, rejected = found.chunk(2)
        return chosen, rejected


def pair_metrics(
    rewards: list[Tensor], log_probs: list[Tensor], counted: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerators and denominators of the metrics of pairs: means over pairs, and the share that is right."""
    number = counted.sum()
    chosen, rejected = rewards

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.masked_fill(~counted, 0.0).sum(), number

    return {
        "reward_accuracy": mean((chosen > rejected).float()),
        "reward_margin": mean(chosen - rejected),
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
        "logp_chosen": mean(log_probs[0]),
        "logp_rejected": mean(log_probs[1]),
    }


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Context without dropout; what was training trains again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
