"""Recipes whose data are not prepared: plans as if they had so many samples, and what prepares them."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from drumline.errors import DataError, NotPrepared, PlanError
from drumline.plan.model import NO_SITE, Plan, SiteFacts
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe
from drumline.session.planning import make_plan

ROWS = 1_000_000


def as_if(samples: int = ROWS) -> str:
    """What stands above a plan of so many assumed samples."""
    return f"As if an epoch had {samples:,} samples (data.samples=N states how many it has):"


def plan_or_assume(recipe: str, samples: int = ROWS) -> tuple[Plan, str]:
    """The plan of a recipe's file and why samples were assumed; no reason where the data told all."""
    try:
        with naming_prepare(recipe):
            return make_plan(load_recipe(recipe)), ""
    except (PlanError, DataError) as error:
        return plan_as_if(load_recipe(recipe), samples=samples), str(error)


def plan_as_if(
    recipe: Recipe,
    gpus: int | None = None,
    gpu: str | None = None,
    samples: int = ROWS,
    site: SiteFacts = NO_SITE,
) -> Plan:
    """The plan of a recipe as if an epoch had so many samples; see `make_plan`."""
    data = recipe.data.model_copy(update={"samples": samples})
    return make_plan(recipe.model_copy(update={"data": data}), gpus, gpu, site=site)


@contextmanager
def naming_prepare(recipe: str, overrides: Sequence[str] | None = None) -> Iterator[None]:
    """Context in which advice to run `drumline prepare` names the recipe and its overrides."""
    try:
        yield
    except NotPrepared as error:
        whole = f"`{_prepare_command(recipe, overrides)}`"
        raise NotPrepared(str(error).replace("`drumline prepare`", whole)) from None


def tell_dry(plan: Plan, recipe: str, overrides: Sequence[str] | None) -> None:
    """Print the warnings of a dry run's plan on stderr, and whether its data are still to be prepared."""
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.data.cache is None:
        print(
            "warning: the data are not prepared, so this would not train yet: run "
            f"`{_prepare_command(recipe, overrides)}`, then repeat --dry-run",
            file=sys.stderr,
        )


def _prepare_command(recipe: str, overrides: Sequence[str] | None) -> str:
    return shlex.join(["drumline", "prepare", recipe, *(overrides or [])])
