"""`drumline run` and `drumline resume`."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.launch import (
    check_offered,
    refuse_secrets,
    refuse_what_cannot_start,
    refuse_what_does_not_fit,
    show_command,
    this_node,
)
from toolkit.cli.plan import AsJson, Gpus, Overrides, RecipeArgument, make_plan, prepare_data
from toolkit.cli.show import plan_table, run_facts
from toolkit.cli.train_here import train_here
from toolkit.errors import LaunchError, RunFolderError
from toolkit.files import ForgivingOutput
from toolkit.metrics_file import last_line
from toolkit.plan.model import Plan
from toolkit.plan.noise import logged_noise, noise_words
from toolkit.recipe.load import load_recipe, override
from toolkit.recipe.schema import Recipe
from toolkit.runs import folder as run_folder
from toolkit.runs.closing import close_run
from toolkit.runs.folder import RunFolder
from toolkit.runs.outcome import Result
from toolkit.runs.record import new_record
from toolkit.secrets import Secrets
from toolkit.units import format_duration

Force = Annotated[bool, typer.Option("--force", help="Train although the plan does not fit.")]


def run_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would start.")] = False,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", min=0, help="With --dry-run: which node.")
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", help="With --dry-run: HOST:PORT of node 0.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then train here through the recipe's launcher."""
    loaded = load_recipe(recipe, overrides)
    if not dry_run:
        check_offered(loaded)
        if node_rank is not None or rendezvous is not None:
            raise LaunchError("--node-rank and --rendezvous go with --dry-run")
    secrets = Secrets(os.environ)
    refuse_secrets(loaded, secrets)
    if run_dir is not None:
        run_folder.check_new(run_dir)
    if dry_run or not needs_data(loaded):
        plan = make_plan(loaded)
        refuse_what_does_not_fit(plan, force, as_json)
        if dry_run:
            return show_command(plan, run_dir, this_node(plan, node_rank, rendezvous), as_json)
    prepare_data(loaded)
    plan = make_plan(loaded)
    refuse_what_cannot_start(plan, force, as_json)
    sys.stderr = ForgivingOutput(sys.stderr.fileno())
    print(plan_table(plan), file=sys.stderr)
    folder = run_folder.create(plan.recipe, run_dir)
    folder.write_record(new_record(plan, sys.argv, secrets))
    _finish(folder, plan, "start", as_json)


def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Overrides = None,
    gpus: Gpus = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Go on from the newest sound checkpoint; another split or strategy, the same training."""
    folder = run_folder.open_run(run)
    record = folder.read_record()
    if record["outcome"] == "finished" and record.get("weights") is None:
        with folder.locked():  # killed after its last step, before the record was complete
            close_run(folder, lambda line: print(line, file=sys.stderr))
        print(f"{run}: this run is finished; its record is complete now", file=sys.stderr)
        return
    if record["outcome"] == "finished":
        raise RunFolderError(
            f"{run}: this run is finished; there is nothing to resume. "
            f"Nearest: `drumline run {run} key=value` starts another"
        )
    with folder.locked():
        recipe = override(folder.latest_plan().recipe, overrides)
        folder.forget_restarts()
    check_offered(recipe)
    prepare_data(recipe)
    plan = make_plan(recipe, gpus)
    if plan.training_sha256 != record["training_sha256"]:
        raise RunFolderError(
            f"{run}: {' '.join(overrides or [])} would make it another training. "
            "A resumed run may change the split, cluster, strategy and launcher only"
        )
    expected = record["data"]["fingerprint"]
    if plan.data.fingerprint != expected:
        raise RunFolderError(
            f"{run}: the data have changed: fingerprint {expected} when the run began, "
            f"{plan.data.fingerprint} now"
        )
    refuse_what_cannot_start(plan, force, as_json)
    sys.stderr = ForgivingOutput(sys.stderr.fileno())
    print(plan_table(plan), file=sys.stderr)
    _finish(folder, plan, "resume", as_json)


def needs_data(recipe: Recipe) -> bool:
    """Whether the number of steps is known only once the data are prepared."""
    counted = recipe.duration.steps is None or recipe.schedule.unit == "epoch"
    return counted and recipe.data.samples is None


def _finish(folder: RunFolder, plan: Plan, cause: str, as_json: bool) -> None:
    """Run the attempts, say how it ended, and leave with the right code."""
    result, seconds = train_here(folder, plan, cause)
    report_end(folder, plan, result, seconds)
    if as_json:
        facts = run_facts(
            folder.path, result.step, result.loss, result.evaluation, seconds, result.outcome
        )
        print(json.dumps(facts))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def report_end(folder: RunFolder, plan: Plan, result: Result, seconds: float) -> None:
    """How a run ended, where it lies, and what to do next."""
    shown = shlex.quote(str(_shortest(folder.path)))
    words = f"{result.outcome} at step {result.step:,} after {format_duration(seconds)}"
    if result.loss is not None:
        words += f", loss {result.loss:.4f}"
    for name, value in (result.evaluation or {}).items():
        words += f", {name} {value:.4f}"
    print(f"\n{words}", file=sys.stderr)
    if result.message:
        print(result.message, file=sys.stderr)
    line = last_line(folder.metrics_file, lambda line: "noise_scale" in line)
    if noise := logged_noise(line or {}):
        print(noise_words(noise, plan.batch.effective, plan.batch.accumulation), file=sys.stderr)
    print(f"run   {shown} (metrics.jsonl has a line for every step)", file=sys.stderr)
    if result.outcome == "finished":
        batch = plan.batch
        gpus = 2 * batch.gpus if batch.effective % (2 * batch.gpus) == 0 else 1
        print(
            f"next  drumline plan {shown} --gpus {gpus}   {_promise(plan)}",
            file=sys.stderr,
        )
    else:
        print(f"next  drumline resume {shown}", file=sys.stderr)


def _promise(plan: Plan) -> str:
    if plan.split_invariance.level == "rounding":
        return "the same training, split otherwise"
    return "the same samples, split otherwise (see its split line)"


def _shortest(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("run")(run_command)
    app.command("resume")(resume_command)
