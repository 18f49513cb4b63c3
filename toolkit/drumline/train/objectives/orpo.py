"""Odds ratio preference optimisation (Hong et al. 2024), whose λ is `beta`; it has no reference model."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Objective
from drumline.train.objectives.preference import Pairs


def build(recipe: Recipe) -> Objective:
    """Build the cross-entropy of the chosen completion with the odds ratio's penalty."""
    return OddsRatio(recipe)


class OddsRatio(Pairs):
    """−log p(chosen) − λ log σ(log odds ratio), where p is the geometric mean over a completion's tokens."""

    mean = True

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float [n]."""
        ratio = log_odds(chosen) - log_odds(rejected)
        return -chosen - self.beta * logsigmoid(ratio)


def log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 − p)) of a log-probability below 0; 1 − p is at least 1e-7, as log p is 0 in fp32."""
    log_probs = log_probs.clamp(max=-1e-7)
    return log_probs - torch.log(-torch.expm1(log_probs))
