"""Reads a logged run from a run folder, a recipe.yaml, a checkpoint, W&B or a model on the hub."""

import contextlib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from drumline.checkpoint.manifest import MANIFEST, read_manifest, verify
from drumline.checkpoint.weights import weight_facts
from drumline.compare.logged import Logged, split_lines
from drumline.errors import RecipeError, RunError, RunFolderError
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12
from drumline.runs.folder import RunFolder, open_run
from drumline.runs.recipe_facts import read_facts


@contextlib.contextmanager
def understood(names: Iterable[str]) -> Iterator[None]:
    """Turn errors over wrong types in logged runs, which anybody may have written, into one RunError.

    `--debug` shows where it was.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        told = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{', '.join(names)}: what is logged there is not of drumline's types ({told})"
        ) from error


def read_logged(where: str) -> Logged:
    """Read any source that `drumline reproduce`, `compare` or `report` accepts; else RunFolderError."""
    if where.startswith("wandb:"):
        from drumline.compare.wandb_runs import read_online

        return read_online(where)
    if where.startswith("hub:"):
        from drumline.compare.hub_runs import fetch_recipe

        return replace(_read_recipe_file(fetch_recipe(where)), name=where)
    path = Path(where)
    if not path.exists():
        raise RunFolderError(f"{where}: does not exist")
    if (path / "record.json").is_file():
        return read_folder(open_run(path))
    if (path / MANIFEST).is_file():
        return _read_checkpoint(path.resolve())
    if path.suffix == ".wandb" or (path.is_dir() and any(path.rglob("run-*.wandb"))):
        from drumline.compare.wandb_runs import read_offline

        return read_offline(path)
    if path.is_file():
        if path.name == "recipe.yaml" and (path.parent / "record.json").is_file():
            return read_folder(open_run(path.parent))
        return _read_recipe_file(path)
    raise RunFolderError(
        f"{where}: neither a run folder (record.json), a checkpoint ({MANIFEST}), a logged recipe.yaml nor a "
        ".wandb file"
    )


def read_folder(folder: RunFolder, until: int | None = None) -> Logged:
    """Read a run folder's record and metrics."""
    steps, evaluations, events = split_lines(read_metrics(folder.metrics_file))
    return Logged(
        str(folder.path),
        folder.read_record(),
        steps,
        evaluations=evaluations,
        events=events,
        until=until,
    )


def _read_recipe_file(path: Path) -> Logged:
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml12.parse(text)
        record, steps = read_facts(text)
    except (OSError, ValueError, RecipeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None
    if not record or not isinstance(recipe, dict):
        raise RunFolderError(
            f"{path}: it does not say what came out, so nothing could be compared. Nearest: "
            f"`drumline run {shlex.quote(str(path))}`; a run folder's recipe.yaml says it once the run "
            "is finished"
        )
    return Logged(str(path), {"recipe": recipe, **record}, steps)


def _read_checkpoint(path: Path) -> Logged:
    """Read the run that contains the checkpoint, up to its step; without one, the checkpoint's own facts."""
    state = verify(path)
    parent = path.parent.parent
    recipe = read_manifest(path)["recipe"]
    logged = Logged(str(path), {"recipe": recipe}, [], until=state.step)
    if (parent / "record.json").is_file():
        logged = read_folder(open_run(parent), state.step)
    if logged.record["recipe"] is None:
        raise RunFolderError(f"{path}: it does not hold its recipe")
    record = {**logged.record, "weights": weight_facts(path)}
    if "data" not in record:
        record |= {
            "data": {"fingerprint": state.fingerprint},
            "training_sha256": state.training_sha256,
        }
    steps = [line for line in logged.steps if line["step"] <= state.step]
    return Logged(str(path), record, steps, until=state.step)
