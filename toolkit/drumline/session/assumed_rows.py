"""Plans of recipes whose data are not at hand: as if they had so many rows."""

from drumline.errors import DataError, PlanError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan

ROWS = 1_000_000


def plan_or_assume(recipe: str) -> tuple[Plan, str]:
    """The plan of a recipe's file and why rows were assumed; no reason where the data told all."""
    try:
        return make_plan(load_recipe(recipe)), ""
    except (PlanError, DataError) as error:
        return make_plan(load_recipe(recipe, [f"data.samples={ROWS}"])), str(error)
