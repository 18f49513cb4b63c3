"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): completions that are desirable, or not.

Losses are relative to an estimate of the KL divergence from the reference, which is the same for all rows of
a step. It is the mean over the whole effective batch of the log-ratios of mismatched completions, measured
before the step, so it does not depend on the split.
"""

import torch
from torch import Tensor, nn

from drumline.data.tasks.base import BASELINE, IGNORED
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, Sums
from drumline.train.objectives.preference import Pair, Preference


def build(recipe: Recipe) -> Objective:
    """Build the loss of single completions."""
    return KahnemanTversky(recipe)


class KahnemanTversky(Preference):
    """λ_D × (1 − σ(reward − z)) of desirable completions, λ_U × (1 − σ(z − reward)) of others.

    A reward is β × (log-probability − the reference's); z is β × max(0, KL).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        spec = recipe.objective
        assert spec.desirable_weight and spec.undesirable_weight
        self._desirable, self._undesirable = spec.desirable_weight, spec.undesirable_weight

    @torch.no_grad()
    def baseline_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Σ of the log-ratios of the mismatched completions, and their number, float32 [2]."""
        counted = self._counted(batch)
        _, reference = self.reference(model, batch)
        ratios = self._mismatched(model, batch) - reference
        return torch.stack([ratios.masked_fill(~counted, 0.0).sum(), counted.sum().float()])

    def set_baseline(self, sums: Tensor) -> None:
        """Take the step's KL estimate from the sums over its whole effective batch, float [2]."""
        self._divergence = (sums[0] / sums[1].clamp(min=1)).clamp(min=0).float()

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Sum the losses of `input_ids` and `targets`, int64 [n, L], by `desirable`, float32 [n]."""
        counted = self._counted(batch)
        reference, _ = self.reference(model, batch)
        found = self.log_probs(model, batch["input_ids"], batch["targets"]).where(counted, -1.0)
        reward = self.beta * (found - reference)
        zero = self.beta * self._divergence
        is_good = batch["desirable"] > 0
        losses = torch.where(
            is_good,
            self._desirable * (1 - torch.sigmoid(reward - zero)),
            self._undesirable * (1 - torch.sigmoid(zero - reward)),
        )
        weighted = losses.masked_fill(~counted, 0.0) * batch["weights"]
        metrics = self._metrics(reward.detach(), found.detach(), is_good, counted)
        return Sums(weighted.sum(), metrics, weighted if "sources" in batch else None)

    def _metrics(
        self, rewards: Tensor, log_probs: Tensor, is_good: Tensor, counted: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over rows of either kind; one is right where its reward is on its side of the baseline."""
        good, bad = counted & is_good, counted & ~is_good

        def mean(values: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            return values.masked_fill(~which, 0.0).sum(), which.sum()

        is_right = (rewards > self.beta * self._divergence) == is_good
        return {
            "reward_accuracy": mean(is_right.float(), counted),
            "reward_chosen": mean(rewards, good),
            "reward_rejected": mean(rewards, bad),
            "logp_chosen": mean(log_probs, good),
            "logp_rejected": mean(log_probs, bad),
        }

    def _counted(self, batch: Batch) -> Tensor:
        return (batch["targets"] != IGNORED).any(dim=1)

    def _mismatched(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.log_probs(model, batch[BASELINE + "input_ids"], batch[BASELINE + "targets"])

    def _both(self, model: nn.Module, batch: Batch) -> Pair:
        own = self.log_probs(model, batch["input_ids"], batch["targets"])
        return own, self._mismatched(model, batch)
