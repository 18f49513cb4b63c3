"""Direct preference optimisation (Rafailov et al. 2023), and the losses that others have put in its place."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drumline.recipe.objective_section import Objective as Spec
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Objective
from drumline.train.objectives.preference import Pairs


def build(recipe: Recipe) -> Objective:
    """Build the loss type that the recipe names."""
    return DirectPreference(recipe)


class DirectPreference(Pairs):
    """A function of β × the log-ratios of the chosen and the rejected completion to the reference."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert recipe.objective.loss_type
        self._spec = recipe.objective
        self._loss = LOSSES[recipe.objective.loss_type]
        self.mean = recipe.objective.loss_type == "sigmoid_norm"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float [n]."""
        return self._loss(self.beta * chosen, self.beta * rejected, self._spec)


def sigmoid(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """−log σ(margin), smoothed as if this share of the pairs were in the wrong order (cDPO)."""
    margin, smoothing = chosen - rejected, spec.label_smoothing or 0.0
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def robust(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """An unbiased estimate of −log σ(margin) where this share is in the wrong order (arXiv 2403.00409)."""
    margin, smoothing = chosen - rejected, spec.label_smoothing or 0.0
    noisy = -(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)
    return noisy / (1 - 2 * smoothing)


def hinge(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """max(0, 1 − margin) (arXiv 2309.06657)."""
    return torch.relu(1 - (chosen - rejected))


def exo_pair(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """KL divergence of softmax(rewards) from (1 − smoothing, smoothing) (arXiv 2402.00856, eq. 16)."""
    margin, smoothing = chosen - rejected, spec.label_smoothing or 0.0
    right, wrong = math.log1p(-smoothing), math.log(smoothing)
    return torch.sigmoid(margin) * (logsigmoid(margin) - right) + torch.sigmoid(-margin) * (
        logsigmoid(-margin) - wrong
    )


def nca_pair(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """Noise contrastive alignment of a pair (arXiv 2402.05369)."""
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """A binary classifier of rewards, without a shift (arXiv 2404.04656)."""
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """Self-play preference optimisation, where the chosen one wins surely (arXiv 2405.00675, eq. 4.7)."""
    assert spec.beta
    return ((chosen - 0.5) / spec.beta).square() + ((rejected + 0.5) / spec.beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """Anchored preferences for chosen texts better than the model's (arXiv 2408.06266, eq. 7)."""
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor, spec: Spec) -> Tensor:
    """Anchored preferences for chosen texts worse than the model's (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


LOSSES: dict[str, Callable[[Tensor, Tensor, Spec], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid,  # of means over a completion's tokens
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}
"""The loss types: a function of the rewards (β × log-ratios), float [n] each, and the recipe's section."""
