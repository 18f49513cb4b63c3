"""Plans of recipes, and their memory, without a GPU."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from drumline.plan.model import VERDICT_WORDS, MemoryFacts, Plan
from drumline.recipe import load
from drumline.recipe.schema import Recipe

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A YAML file, the name of a shipped recipe, a recipe's keys and values, or a recipe."""
Overrides = Mapping[str, Any] | Sequence[str]
"""Values by dotted keys, `{"batch.per_device": 4}`, or as on the command line, `["batch.per_device=4"]`."""


class ShownPlan(Plan):
    """A Plan that a notebook shows: the batch equation, memory by phase, and which other splits fit."""

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The same plan, shown."""
        return cls(**{one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)})

    def __repr__(self) -> str:
        b = self.batch
        equation = f"{b.effective} = {b.per_device} × {b.gpus} × {b.accumulation}"
        return f"<plan of {self.recipe.recipe}: {equation}, {VERDICT_WORDS[self.memory.verdict]}>"

    def __str__(self) -> str:
        """The table that `drumline plan` prints."""
        from drumline.session.show import plan_table

        return plan_table(self)

    def _repr_html_(self) -> str:
        from drumline.plan.sweep import sweep
        from drumline.session.plan_page import fragment
        from drumline.session.planning import world_of

        return fragment(self, sweep(self, world_of(self)))


def recipe_of(recipe: RecipeLike, overrides: Overrides = ()) -> Recipe:
    """The recipe with its overrides; RecipeError names every key that is wrong.

    Paths in a file are relative to it, those in a mapping or in overrides to the current folder.
    """
    texts = override_texts(overrides)
    if isinstance(recipe, Recipe):
        return load.override(recipe, texts)
    if isinstance(recipe, Mapping):
        return load.recipe_of_mapping(dict(recipe), texts)
    return load.load_recipe(os.fspath(recipe), texts)


def override_texts(overrides: Overrides) -> list[str]:
    """Overrides as the command line takes them."""
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, Mapping):
        return [f"{key}={_yaml(value)}" for key, value in overrides.items()]
    return list(overrides)


def _yaml(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


def plan(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    trace: bool = False,
) -> ShownPlan:
    """Resolve a recipe: batch equation, optimizer steps, schedule and memory per rank.

    Args:
        recipe: a YAML file, a shipped recipe's name, or a recipe's keys and values.
        overrides: values of its keys, such as `{"optimizer.lr": 1e-4}`.
        gpus: split the same effective batch over so many GPUs instead.
        gpu: of this kind, such as `"h100-80gb"`.
        trace: memory from the model's real training step on tensors without data, which needs torch and takes
            seconds; else from a closed form where there is one.

    Returns:
        The Plan, whose `memory.device` has the low, expected and high bytes of a rank. In a notebook it is
        shown as a table with bars. A plan that does not fit is returned, too: `plan.memory.fits` is False.

    Raises:
        RecipeError: a key or value is wrong. PlanError: the equation does not hold, or parts exclude each
            other.
    """
    from drumline.session.planning import make_plan, traced

    found = make_plan(recipe_of(recipe, overrides), gpus, gpu)
    return ShownPlan.of(traced(found) if trace else found)


def estimate_memory(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    trace: bool = False,
) -> MemoryFacts:
    """The peak memory of a rank in bytes: `allocated`, `reserved` and `device`, each low, expected and high.

    `parts` are the allocated bytes at the peak, `phases` the peak of each phase, `verdict` whether it fits
    the recipe's GPU. Arguments and errors are those of `plan`. How it is computed: docs/memory.md.
    """
    return plan(recipe, overrides, gpus=gpus, gpu=gpu, trace=trace).memory
