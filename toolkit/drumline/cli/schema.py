"""`drumline schema`: JSON Schemas of a recipe and of a plan."""

import json
from pathlib import Path
from typing import Annotated

import typer

from drumline.files import write_text
from drumline.plan.model import Plan
from drumline.recipe.keys import json_schema


def schema_command(
    plan: Annotated[bool, typer.Option("--plan", help="The plan's schema instead.")] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Write it to a file.")
    ] = None,
) -> None:
    """Print the JSON Schema of a recipe (or of a plan), for editors and scripts.

    Example: drumline schema --to recipe.schema.json
    """
    if plan:
        from pydantic import TypeAdapter

        found = TypeAdapter(Plan).json_schema()
    else:
        found = json_schema()
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if to is None:
        print(text)
    else:
        write_text(to, f"{text}\n")


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command("schema")(schema_command)
