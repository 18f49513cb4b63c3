"""Prepares a recipe's data and fetches its model of the hub, with progress bars on a terminal."""

import sys
import time
from pathlib import Path

from drumline.errors import PlanError
from drumline.recipe.schema import Recipe

_SHOW_EVERY_S = 0.2


def prepare_data(recipe: Recipe) -> Path:
    """Return the folder of a recipe's prepared rows; prepare them first if it does not exist.

    A model of the hub is fetched first, so that no rank has to.
    """
    from drumline.data.prepare import prepare

    if recipe.model.name:
        from drumline.architectures.hub import fetch

        fetch(recipe.model.name, recipe.model.revision)
    if recipe.data.is_chat_with_images:
        _refuse_another_image_token(recipe)
    if not sys.stderr.isatty():
        return prepare(recipe.data, recipe.project)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        started, shown = time.monotonic(), 0.0

        def show(documents: int, written: int, share: float) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < _SHOW_EVERY_S:
                return
            shown = now
            speed = written / max(now - started, 1e-9)
            words = f"{documents:,} documents, {written:,} ({speed:,.0f} a second)"
            bar.update(task, description=words, completed=share)

        return prepare(recipe.data, recipe.project, show)


def _refuse_another_image_token(recipe: Recipe) -> None:
    """PlanError where the model looks for its images at another token than the processor writes."""
    from drumline.data.chats.processor import ChatProcessor
    from drumline.session.world import model_config

    assert recipe.data.image
    config = {**(model_config(recipe.model, []) or {}), **recipe.model.config}
    stated = next((config[k] for k in ("image_token_id", "image_token_index") if k in config), None)
    written = ChatProcessor(recipe.data.image).feature_tokens
    if stated is not None and stated not in written:
        raise PlanError(
            f"model.config.image_token_id: {stated}, and the processor {recipe.data.image.processor} writes "
            f"{', '.join(map(str, written))}. Nearest: data.image.processor, the folder of this model"
        )
