"""`drumline data show RECIPE`: rows as the model will see them."""

import sys
from typing import Annotated

import typer

from drumline.cli.options import Overrides, RecipeArgument, TrustCode
from drumline.session.trust import load_to_run

group = typer.Typer(help="The rows of a recipe's data.", rich_markup_mode=None)
_MARKS = ("⟦", "⟧")
"""Around what is trained."""


@group.callback()
def _data() -> None:
    """The rows of a recipe's data."""


@group.command("show")
def show_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    trust_code: TrustCode = False,
) -> None:
    """Print the first rows as text, with ⟦ ⟧ around what is trained, their lengths, and what was cut.

    Example: drumline data show chat-sft -n 2
    """
    from drumline.data.show import show

    loaded = load_to_run(recipe, overrides, trust_code)
    found = show(loaded.data, loaded.project, count)
    print(f"rows: {found.style}", file=sys.stderr)
    for row in found.rows:
        note = f"; {row.note}" if row.note else ""
        print(f"--- {row.where}: {row.tokens:,} tokens, {row.trained:,} trained{note}")
        if row.pieces:
            print("".join(text.join(_MARKS) if is_in else text for text, is_in in row.pieces))


def register(app: typer.Typer) -> None:
    """Add this group."""
    app.add_typer(group, name="data")
