"""`drumline export RUN DIR`: the newest sound checkpoint as a folder that transformers loads."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drumline.checkpoint.manifest import step_of, verify
from drumline.checkpoint.retention import find_checkpoints, newest_sound
from drumline.checkpoint.state import badness
from drumline.cli.options import SiteOfRun, TrustCode
from drumline.errors import CheckpointError, LaunchError, RunFolderError
from drumline.files import new_folder
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe
from drumline.runs.folder import RunFolder, open_run
from drumline.session.trust import refuse_foreign_code

if TYPE_CHECKING:
    from drumline.data.dataset_manifest import DatasetManifest


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty.")],
    best: Annotated[bool, typer.Option("--best", help="The best evaluated one instead.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model, with its adapter added to it.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="The averages of the trained weights (recipe: ema).")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="NAME", help="Also to this repository of the hub, with a model card."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everybody may read it, if it is new.")
    ] = False,
    to: Annotated[
        str, typer.Option("--to", help="local, or slurm: as a job, after those of the run.")
    ] = "local",
    site_file: SiteOfRun = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a checkpoint's model as config.json and safetensors, from any engine and split.

    Example: drumline export runs/tiny-code-lm-1 model
    """
    folder, wish = open_run(run), _Wish(best, merge, ema, push, public)
    _check_words(target, wish, to, site_file)
    if to == "slurm":
        return _export_in_slurm(folder, target, wish, site_file, trust_code)
    refuse_foreign_code(folder.latest_plan().recipe, str(run), trust_code)
    _export_here(folder, target, wish)


@dataclass(frozen=True)
class _Wish:
    """Which checkpoint and which of its weights are written, and the repository that they also go to."""

    best: bool
    merge: bool
    ema: bool
    push: str | None
    public: bool


def _check_words(target: Path, wish: _Wish, to: str, site_file: Path | None) -> None:
    """Refuse a folder that is not empty, and options that do not go together."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target} is not an empty folder. Nearest: another folder")
    if wish.public and wish.push is None:
        raise LaunchError("--public: nothing is pushed. Nearest: --push NAME, or without it")
    if wish.push is not None and to != "local":
        raise LaunchError("--push: a job pushes nothing. Nearest: --to local")
    if to not in ("local", "slurm"):
        raise LaunchError(f"--to {to}: choose from local, slurm")
    if site_file is not None and to == "local":
        raise LaunchError("--site: an export here uses none. Nearest: --to slurm, or without it")
    if wish.push is not None:
        from drumline.session.hub import check_login

        check_login(wish.push)


def _export_in_slurm(
    folder: RunFolder, target: Path, wish: _Wish, site_file: Path | None, trust_code: bool
) -> None:
    """Submit a job that exports after those of the run."""
    recipe = validate(folder.read_record()["recipe"], str(folder.path))
    refuse_foreign_code(recipe, str(folder.path), trust_code)
    from drumline.session.submit import submit_export
    from drumline.session.submit_checks import refuse_without, site_of_run

    site = site_of_run(folder, site_file, "slurm", trust_code)
    refuse_without("slurm", recipe)
    _check_wish(wish, recipe, folder)
    stated = {"--best": wish.best, "--merge": wish.merge, "--ema": wish.ema}
    options = [name for name, is_given in stated.items() if is_given]
    print(f"job {submit_export(folder, target, options, site)}")


def _export_here(folder: RunFolder, target: Path, wish: _Wish) -> None:
    """Write the folder, tell what it holds, push it where that is wished."""
    plan = folder.latest_plan()
    _check_wish(wish, plan.recipe, folder)
    path = _best(folder) if wish.best else _newest(folder)
    from drumline.checkpoint.weights import refuse_other_weights
    from drumline.train.export import check_finite, export

    refuse_other_weights(path, folder.read_record().get("weights"))
    manifest = _manifest_of(plan, folder)
    with new_folder(target) as written:
        count = export(plan, manifest, path, written, wish.merge, wish.ema)
        bad = check_finite(written)
        if wish.push is not None:
            _add_card(wish.push, folder, plan, path, written)
    for name in bad:
        print(f"warning: {name} holds values that are not finite", file=sys.stderr)
    print(f"{count:,} parameters of {path.name} in {target}")
    if wish.push is not None:
        from drumline.session.hub import push as send

        print(send(target, wish.push, wish.public))


def _manifest_of(plan: Plan, folder: RunFolder) -> "DatasetManifest":
    """The manifest of the prepared data; RunFolderError where they are gone."""
    from drumline.data.cache import cache_folder
    from drumline.data.dataset_manifest import read_dataset_manifest

    assert plan.data.cache
    places = (Path(plan.data.cache), cache_folder(plan.recipe.data, plan.recipe.project))
    manifest = next(filter(None, map(read_dataset_manifest, places)), None)
    if manifest is None:
        raise RunFolderError(
            f"{plan.data.cache}: the prepared data are gone. Nearest: drumline prepare "
            f"{shlex.quote(str(folder.path))}"
        )
    return manifest


def _add_card(name: str, folder: RunFolder, plan: Plan, checkpoint: Path, written: Path) -> None:
    """A model card, and the recipe with what came out of it; RunFolderError before the run has ended."""
    from drumline.compare.hub_runs import RECIPE
    from drumline.compare.sources import read_folder
    from drumline.session.model_card import model_card

    recipe = folder.path / "recipe.yaml"
    record = folder.read_record()
    if record.get("weights") is None:
        raise RunFolderError(
            f"{folder.path}: has not ended, so its record is not complete. Nearest: without --push"
        )
    (written / RECIPE).parent.mkdir()
    (written / RECIPE).write_bytes(recipe.read_bytes())
    step = step_of(checkpoint)
    assert step is not None
    found = [line for line in read_folder(folder).evaluations if line["step"] <= step]
    (written / "README.md").write_text(
        model_card(name, plan, record, step, found), encoding="utf-8"
    )


def _check_wish(wish: _Wish, recipe: Recipe, folder: RunFolder) -> None:
    """LaunchError where there is no adapter to merge, no average, or no base that others could load."""
    if wish.ema and recipe.ema is None:
        raise LaunchError(f"--ema: {folder.path} kept no averages. Nearest: without --ema")
    if wish.merge and recipe.model.adapter is None:
        raise LaunchError(f"--merge: {folder.path} trained no adapter. Nearest: without --merge")
    if recipe.model.adapter and not wish.merge and recipe.model.source not in ("folder", "hub"):
        raise LaunchError(
            f"{folder.path}: the adapter's base is not a folder or a model of the hub, so nobody could load "
            "it. Nearest: --merge"
        )


def _newest(folder: RunFolder) -> Path:
    """The newest sound checkpoint; CheckpointError without one."""
    found = newest_sound(folder.checkpoints, lambda line: print(line, file=sys.stderr))
    if found is None:
        raise CheckpointError(f"{folder.path}: no sound checkpoint")
    return found[0]


def _best(folder: RunFolder) -> Path:
    """Return the best of the evaluated checkpoints; CheckpointError if it is damaged."""
    state = verify(_newest(folder))
    scored = [
        (badness(state, state.scores[str(step_of(path))]), path)
        for path in find_checkpoints(folder.checkpoints)
        if str(step_of(path)) in state.scores
    ]
    if not scored:
        raise RunFolderError(
            f"{folder.path}: no saved step has been evaluated. Nearest: without --best"
        )
    best = min(scored)[1]
    verify(best)
    return best


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("export")(export_command)
