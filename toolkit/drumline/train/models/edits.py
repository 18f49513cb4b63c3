"""Changes of a model between building and materialising: freezing, adapters and the like.

An edit is called with the model before its weights are made (on the meta device, where they are drawn),
changes it in place, and is the same on every rank. Those of a recipe (`model.edits`) are functions of its
project.
"""

from torch import nn

from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe


def apply_edits(model: nn.Module, recipe: Recipe) -> None:
    """All edits of the recipe, in its order; PlanError where they leave nothing to train."""
    for name in recipe.model.edits:
        load_factory(name, recipe.project)(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError("model: no parameter is trainable. Nearest: fewer frozen ones")
