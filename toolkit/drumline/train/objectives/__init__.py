"""What is minimised: one class an objective, found by the recipe's `objective.name`.

The gradient of a step is (1/W) · d/dθ Σ loss over every counted token (or sample) of the whole effective
batch. An objective returns its part of Σ, undivided; the loop alone divides by W.

To add one: its file here and its row in `OBJECTIVES`, its name and keys in `recipe/schema.py`.
"""

from collections.abc import Callable
from typing import Any

from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import Batch, Objective, ObjectiveModule, Sums, model_inputs
from drumline.train.objectives.cross_entropy import build_cross_entropy

OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {
    "cross_entropy": build_cross_entropy,
}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "ObjectiveModule",
    "Sums",
    "build_objective",
    "model_inputs",
]


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective; `custom` is made by a function of the recipe's project."""
    spec = recipe.objective
    if spec.factory is None:
        return OBJECTIVES[spec.name](recipe)
    made: Any = load_factory(spec.factory, recipe.project)(**spec.options)
    if not callable(getattr(made, "sums", None)):
        raise PlanError(
            f"objective.factory: {spec.factory} made a {type(made).__name__} without sums(model, batch). "
            "Nearest: a subclass of drumline.train.objectives.Objective"
        )
    return made  # type: ignore[no-any-return]
