"""Prepares a recipe's data and fetches its model of the hub, with progress bars on a terminal."""

import sys
from pathlib import Path

from drumline.recipe.schema import Recipe


def prepare_data(recipe: Recipe) -> Path:
    """Return the folder of a recipe's prepared rows; prepare them first if it does not exist.

    A model of the hub is fetched first, so that no rank has to.
    """
    from drumline.data.prepare import prepare

    if recipe.model.name:
        from drumline.architectures.hub import fetch

        fetch(recipe.model.name, recipe.model.revision)
    if not sys.stderr.isatty():
        return prepare(recipe.data, recipe.project)
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing")

        def show(documents: int, written: int) -> None:
            progress.update(task, description=f"preparing: {documents:,} documents, {written:,}")

        return prepare(recipe.data, recipe.project, show)
