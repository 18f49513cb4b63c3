"""The loss functions: one class per objective, selected by the recipe's `objective.name`.

The gradient of a step is (1/W) · d/dθ Σ loss over every counted token (or sample) of the whole effective
batch. An objective returns its micro-batch's part of Σ, undivided; engine and loop divide by W.

The objective named `x` is what `build(recipe)` of `train/objectives/x.py` returns. To add one: that file,
and its name and keys in `recipe/schema.py`.
"""

from importlib import import_module
from typing import Any

from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe
from drumline.train.objectives.base import (
    Batch,
    Objective,
    ObjectiveModule,
    Sums,
    model_input_names,
    model_inputs,
)

__all__ = [
    "Batch",
    "Objective",
    "ObjectiveModule",
    "Sums",
    "build_objective",
    "model_input_names",
    "model_inputs",
]


def build_objective(recipe: Recipe) -> Objective:
    """Build the recipe's objective; `custom` is made by a function of the recipe's project."""
    spec = recipe.objective
    if spec.factory is None:
        built: Objective = import_module(f"{__name__}.{spec.name}").build(recipe)
        return built
    made: Any = load_factory(spec.factory, recipe.project)(**spec.options)
    if not callable(getattr(made, "sums", None)):
        raise PlanError(
            f"objective.factory: {spec.factory} made a {type(made).__name__} without sums(model, batch). "
            "Nearest: a subclass of drumline.train.objectives.Objective"
        )
    return made  # type: ignore[no-any-return]
