"""Applies edits to a model between building and materialising, such as freezing or adapters.

An edit changes the model in place, and in the same way on every rank. Randomly initialised weights are still
on the meta device when it runs; pretrained ones are loaded before it, all of them on every rank. The recipe's
`model.edits` name functions of its project.
"""

from torch import nn

from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe


def apply_edits(model: nn.Module, recipe: Recipe) -> None:
    """Apply the recipe's edits in order; PlanError where no parameter is trainable afterwards."""
    for name in recipe.model.edits:
        load_factory(name, recipe.project)(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError("model: no parameter is trainable. Nearest: fewer frozen ones")
