"""Simple preference optimisation (Meng et al. 2024), with the target margin `gamma`; without a reference."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Objective
from drumline.train.objectives.preference import Pairs


def build(recipe: Recipe) -> Objective:
    """Build the loss of the margin between mean log-probabilities."""
    return SimplePreference(recipe)


class SimplePreference(Pairs):
    """−log σ(β × margin − γ), where log-probabilities are means over a completion's tokens."""

    mean = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert recipe.objective.gamma is not None
        self._gamma = recipe.objective.gamma

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float [n]."""
        return -logsigmoid(self.beta * (chosen - rejected) - self._gamma)
