"""`drumline reproduce`: trains again from a run's record and compares; exit 5 if the runs diverge."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.checkpoint.weights import identity_of
from drumline.cli.options import AsJson, Force, Gpus, GpuType, Overrides, Tolerance
from drumline.compare.comparison import TOLERANCE, Comparison, compare
from drumline.compare.differences import (
    code_differences,
    difference_lines,
    environment_differences,
    input_differences,
)
from drumline.compare.logged import Logged
from drumline.compare.sources import read_folder, read_logged
from drumline.errors import NOT_EQUAL_EXIT_CODE, DataError, PlanError, RecipeError, RunError
from drumline.plan.identity import plain_sha256, training_sha256
from drumline.plan.model import Plan
from drumline.recipe.load import override, validate
from drumline.recipe.schema import Recipe, commands_of, factories_of
from drumline.runs import folder as run_folder
from drumline.runs.closing import close_run, note_weights_sha256
from drumline.runs.code import CODE, remove_worktree, restore_code
from drumline.runs.folder import RunFolder
from drumline.runs.record import new_record
from drumline.secrets import Secrets
from drumline.session.ancestors import with_parent_here
from drumline.session.ending import report_end
from drumline.session.launch import check_offered, refuse_what_cannot_start
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.session.show import plan_table
from drumline.session.train_here import train_here


def reproduce_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, its recipe.yaml, a checkpoint, a .wandb file, "
            "wandb:ENTITY/PROJECT/ID, hub:NAME.",
        ),
    ],
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu: GpuType = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Only the first N.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    code: Annotated[
        bool, typer.Option("--code", help="Restore the recorded code into a worktree, and use it.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python that the record names.")
    ] = False,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="Continue although the data have changed.")
    ] = False,
    tolerance: Tolerance = TOLERANCE,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train again here from a run's record, at another split if asked, and compare step by step.

    Exit 0: identical, or equal within the tolerance; 5: diverged.

    Example: drumline reproduce runs/tiny-code-lm-1 --gpus 1 --steps 15
    """
    logged = read_logged(what)
    recipe = _recorded_recipe(logged)
    if logged.last_step is None:
        raise RunError(
            f"{logged.name}: it holds no step, so nothing could be compared. Nearest: drumline run"
        )
    if code and not trust_code:
        raise RecipeError("--code runs Python restored from the record, so it needs --trust-code")
    if run_dir is not None:
        run_folder.check_new(run_dir)
    recipe = _adapted(recipe, overrides)
    _refuse_foreign_code(recipe, trust_code)
    check_offered(recipe)
    recipe = with_parent_here(
        recipe,
        logged.record.get("ancestry") or [],
        lambda own: _own_code_only(_adapted(own, _of_the_machine(overrides)), trust_code),
        lambda own: _that_can_start(make_plan(own, gpus, gpu), force, as_json),
        changed_data,
    )
    folder = run_folder.create(recipe, run_dir)
    try:
        if code:
            recipe = _with_restored_code(recipe, logged, folder)
        plan, record = _plan_here(recipe, logged, gpus, gpu, changed_data)
        until = _until(logged, plan, steps)
        refuse_what_cannot_start(plan, force, as_json)
    except BaseException:
        _remove(folder)
        raise
    folder.write_recipe(plan.recipe.model_dump(by_alias=True))
    folder.write_record(record)
    print(plan_table(plan), file=sys.stderr)
    result, seconds = train_here(folder, plan, "reproduce", until)
    report_end(folder, plan, result, seconds)
    reached = result.step >= (until or plan.steps.total) or result.outcome == "finished"
    if not reached:
        raise typer.Exit(result.exit_code or RunError.exit_code)
    if result.outcome == "stopped":
        close_run(folder, lambda line: print(line, file=sys.stderr))
    if "sha256" in (logged.record.get("weights") or {}):
        note_weights_sha256(folder)
    found = compare(logged, read_folder(folder), tolerance)
    _tell(found, logged, folder, as_json)
    if found.verdict == "diverged":
        raise typer.Exit(NOT_EQUAL_EXIT_CODE)


def _recorded_recipe(logged: Logged) -> Recipe:
    """Return the record's recipe; RecipeError if its hash is not the recorded recipe_sha256."""
    told = logged.record.get("recipe_sha256")
    found = plain_sha256(logged.recipe)
    if told not in (None, found):
        raise RecipeError(
            f"{logged.name}: its recipe has been changed since it ran: recipe_sha256 {told} recorded, "
            f"{found} now. Nearest: `drumline run` for another training"
        )
    return validate(logged.recipe, logged.name)


def _adapted(recipe: Recipe, overrides: list[str] | None) -> Recipe:
    """Apply overrides and turn trackers off; RecipeError if an override changes training_sha256."""
    before = training_sha256(recipe)
    quiet = recipe.model_copy(
        update={"logging": recipe.logging.model_copy(update={"wandb": None, "tensorboard": False})}
    )
    adapted = override(quiet, overrides)
    if training_sha256(adapted) != before:
        raise RecipeError(
            f"{' '.join(overrides or [])} would make it another training; reproduce may change the split, "
            "cluster, strategy and launcher, and where the data lie. Nearest: `drumline run`, then `compare`"
        )
    return adapted


def _of_the_machine(overrides: list[str] | None) -> list[str]:
    """Those overrides that hold for the run's ancestors, too: not where its own data or its parent lie."""
    others = ("data.", "data=", "start_from", "model.", "model=")
    return [one for one in overrides or () if not one.startswith(others)]


def _own_code_only(recipe: Recipe, trust_code: bool) -> Recipe:
    _refuse_foreign_code(recipe, trust_code)
    return recipe


def _that_can_start(plan: Plan, force: bool, as_json: bool) -> Plan:
    refuse_what_cannot_start(plan, force, as_json)
    return plan


def _refuse_foreign_code(recipe: Recipe, trust_code: bool) -> None:
    named = [*factories_of(recipe), *commands_of(recipe)]
    if named and not trust_code:
        raise RecipeError(
            f"the record names code to run: {', '.join(named)} in {recipe.project}. Nearest: read it, "
            "then --trust-code"
        )


def _with_restored_code(recipe: Recipe, logged: Logged, folder: RunFolder) -> Recipe:
    recorded = logged.record.get("code")
    if not recorded or not (recorded.get("commit") or recorded.get("untracked")):
        raise RunError(f"--code: {logged.name} holds no code. Nearest: without --code")
    project = restore_code(recorded, Path.cwd(), folder.path / CODE)
    for name, why in recorded.get("left_out", {}).items():
        print(f"--code: {name} was not recorded: {why}", file=sys.stderr)
    print(f"--code: restored into {folder.path / 'code'}", file=sys.stderr)
    return recipe.model_copy(update={"project": str(project)}) if recipe.project else recipe


def _plan_here(
    recipe: Recipe, logged: Logged, gpus: int | None, gpu: str | None, changed_data: bool
) -> tuple[Plan, dict[str, Any]]:
    """Return the new run's plan and record; print what differs from the original.

    DataError if the data fingerprint differs, unless `changed_data`.
    """
    prepare_data(recipe)
    plan = make_plan(recipe, gpus, gpu)
    old = logged.record
    parent = {
        "run": logged.name,
        "recipe_sha256": old.get("recipe_sha256"),
        "created": old.get("created"),
        "weights": identity_of(old.get("weights") or {}),
    }
    record = new_record(plan, sys.argv, Secrets(os.environ), parent)
    found = {
        **input_differences(old, record),
        **code_differences(old, record),
        **environment_differences(old, record),
    }
    print("differs here:" if found else "nothing that was recorded differs here", file=sys.stderr)
    for line in difference_lines(found):
        print(f"  {line}", file=sys.stderr)
    was, now = (old.get("data") or {}).get("fingerprint"), plan.data.fingerprint
    if was is not None and was != now and not changed_data:
        raise DataError(
            f"the data have changed: fingerprint {was} when the run was logged, {now} here. Nearest: the old "
            "data, or --changed-data to see where it diverges"
        )
    return plan, record


def _until(logged: Logged, plan: Plan, steps: int | None) -> int | None:
    """Return the step to stop after; None if it is the plan's last one."""
    total, last = plan.steps.total, logged.last_step
    if steps is not None and steps > total:
        raise PlanError(f"--steps {steps}: the run has {total:,} steps")
    first = plan.first_step
    if steps is not None and steps < first:
        raise PlanError(
            f"--steps {steps}: the run goes on after step {first - 1:,} of another one. Nearest: "
            f"--steps {first}"
        )
    known = min(step for step in (steps, last, total) if step is not None)
    if steps is not None and last is not None and steps > last:
        raise PlanError(f"--steps {steps}: the record goes to step {last:,}")
    return known if known < total else None


def _remove(folder: RunFolder) -> None:
    """Delete the folder of a run that does not start, and deregister its git worktree."""
    import shutil

    worktree = folder.path / CODE
    if (worktree / ".git").exists():
        remove_worktree(worktree)
    shutil.rmtree(folder.path, ignore_errors=True)


def _tell(found: Comparison, logged: Logged, folder: RunFolder, as_json: bool) -> None:
    """Write the verdict to stdout and into the new run's record."""
    plain = {"verdict": found.verdict, "words": found.words, **dataclasses.asdict(found)}
    folder.note(reproduced=plain)
    if as_json:
        print(json.dumps({"run": str(folder.path), "of": logged.name, **plain}))
    else:
        print(found.words)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("reproduce")(reproduce_command)
