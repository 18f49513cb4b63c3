"""Identity preference optimisation (Azar et al. 2023, eq. 17), whose τ is `beta`."""

from torch import Tensor

from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Objective
from drumline.train.objectives.preference import Pairs


def build(recipe: Recipe) -> Objective:
    """Build the squared distance of the log-ratios from 1 / 2β."""
    return IdentityPreference(recipe)


class IdentityPreference(Pairs):
    """(margin − 1 / 2β)², where log-probabilities are means over a completion's tokens, as in TRL."""

    mean = True

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float [n]."""
        return (chosen - rejected - 1 / (2 * self.beta)).square()
