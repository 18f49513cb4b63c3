"""`drumline explain KEY [RECIPE]`: what a key of a recipe means, and what it comes to."""

from typing import Annotated

import typer

from drumline.cli.options import Overrides
from drumline.plan.model import Plan
from drumline.recipe.keys import Key, find_key, keys_in
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe
from drumline.recipe.yaml12 import dump_flow
from drumline.session.planning import make_plan
from drumline.session.show import topics

_ARITHMETIC = (
    ("batch", ("batch", "steps")),
    ("duration", ("steps",)),
    ("data.samples", ("steps",)),
    ("data.sequence_length", ("steps", "memory")),
    ("data.mixture", ("sources",)),
    ("schedule", ("schedule",)),
    ("optimizer.lr", ("schedule",)),
    ("optimizer", ("memory",)),
    ("model", ("model", "memory")),
    ("cluster", ("batch", "memory")),
    ("strategy", ("batch", "memory")),
    ("precision", ("memory",)),
    ("loss.chunked", ("memory",)),
    ("ema", ("memory",)),
    ("start_from", ("start",)),
    ("objective", ("split",)),
)
"""Topics of the plan that a key changes, by the beginning of its name; the first that fits."""


def explain_command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A dotted name, or its last part.")],
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A file or a shipped name.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """What a key means: type, unit, default, example; with a recipe, what it comes to there.

    Names of other tools are understood, too. Example: drumline explain warmup_steps llama-8b-8xh100
    """
    found = find_key(key)
    print("\n".join(_lines(found)))
    for inner in keys_in(found.name) if found.is_section else ():
        print(f"  {inner.name:<34} {inner.meaning.partition('. ')[0].rstrip('.')}")
    if recipe is None:
        return
    loaded = load_recipe(recipe, overrides)
    print(f"\nin {loaded.recipe}: {dump_flow(_value(loaded, found.name))}")
    for label, text in _of_the_plan(make_plan(loaded), found):
        print(f"  {label}: {text}".replace("\n", "\n    "))


def _lines(key: Key) -> list[str]:
    rows = (
        ("type", key.kind),
        ("unit", key.unit),
        ("default", key.default),
        ("example", f"{key.name.rpartition('.')[2]}: {key.example}" if key.example else ""),
        ("more in", f"docs/{key.page}" if key.page else ""),
    )
    return [key.name, key.meaning, *(f"  {label:<8} {text}" for label, text in rows if text)]


def _value(recipe: Recipe, name: str) -> object:
    """The recipe's value of a key, as plain values; of the items of a list, all of them."""
    found: object = recipe.model_dump(by_alias=True)
    for part in name.split("."):
        if isinstance(found, list):
            found = [item.get(part) for item in found]
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return found


def _of_the_plan(plan: Plan, key: Key) -> list[tuple[str, str]]:
    wanted = next((of for start, of in _ARITHMETIC if f"{key.name}.".startswith(f"{start}.")), ())
    return [(label, text) for label, text in topics(plan) if label in wanted]


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command("explain")(explain_command)
