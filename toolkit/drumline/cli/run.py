"""`drumline run` and `drumline resume`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.cli.options import (
    AsJson,
    Force,
    Gpus,
    Overrides,
    RecipeArgument,
    SlurmAccount,
    SlurmPartition,
    SlurmQos,
    SlurmTime,
    TrustCode,
)
from drumline.cluster.jobs import job_state
from drumline.errors import LaunchError, RunFolderError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe, override
from drumline.runs import folder as run_folder
from drumline.runs.closing import close_run
from drumline.runs.folder import RunFolder
from drumline.runs.record import new_record
from drumline.secrets import Secrets
from drumline.session.ending import report_end
from drumline.session.launch import (
    check_offered,
    refuse_secrets,
    refuse_what_cannot_start,
    refuse_what_does_not_fit,
    show_command,
    this_node,
)
from drumline.session.manifests import apply_again
from drumline.session.planning import make_plan, needs_data
from drumline.session.prepare import prepare_data
from drumline.session.show import plan_table, run_facts
from drumline.session.submit import submit_again
from drumline.session.submit_checks import JobOptions, check_slurm, read_site, refuse_without
from drumline.session.train_here import train_here
from drumline.session.trust import load_to_run, refuse_foreign_code, refuse_foreign_site
from drumline_launchers.site import SITE


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
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then train on this machine with the recipe's launcher."""
    loaded = (
        load_recipe(recipe, overrides) if dry_run else load_to_run(recipe, overrides, trust_code)
    )
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
    print(plan_table(plan), file=sys.stderr)
    record = new_record(plan, sys.argv, secrets)  # before the folder exists: git can take seconds
    folder = run_folder.create(plan.recipe, run_dir)
    folder.write_record(record)
    _finish(folder, plan, "start", as_json)


def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Overrides = None,
    gpus: Gpus = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Begin at step 1 again, where no checkpoint is left."),
    ] = False,
    to: Annotated[
        str, typer.Option("--to", help="local, or as a job of its cluster: slurm, kubernetes.")
    ] = "local",
    site_file: Annotated[
        Path | None, typer.Option("--site", help="Instead of the site that it was submitted with.")
    ] = None,
    time: SlurmTime = None,
    partition: SlurmPartition = None,
    account: SlurmAccount = None,
    qos: SlurmQos = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Slurm: submitted, but not started.")
    ] = False,
    force: Force = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Resume from the newest sound checkpoint; split and strategy may change, the training may not."""
    folder = run_folder.open_run(run)
    record = folder.read_record()
    if record["outcome"] == "finished" and record.get("weights") is None:
        with folder.locked():  # killed after its last step, before the record was complete
            close_run(folder, lambda line: print(line, file=sys.stderr))
        print(f"{run}: this run is finished; its record is complete now", file=sys.stderr)
        return
    if record["outcome"] == "finished":
        raise RunFolderError(
            f"{run}: this run is finished, its schedule has ended, and it cannot be given more steps. "
            f"Nearest: `drumline run {run} duration.steps=N` trains another one, from step 1"
        )
    with folder.locked():
        recipe = override(folder.latest_recipe(), overrides)
        refuse_foreign_code(recipe, str(run), trust_code)
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
    if to != "local":
        options = JobOptions(time=time, partition=partition, account=account, qos=qos)
        if site_file is None:
            refuse_foreign_site(folder.path, trust_code)
        return _resume_in_queue(folder, plan, record, to, site_file, options, hold, from_scratch)
    refuse_what_cannot_start(plan, force, as_json)
    if from_scratch:
        with folder.locked():
            kept = folder.begin_anew()
        names = ", ".join(path.name for path in kept)
        print(f"{run}: begins again at step 1; what it had is kept as {names}", file=sys.stderr)
    print(plan_table(plan), file=sys.stderr)
    _finish(folder, plan, "from scratch" if from_scratch else "resume", as_json)


def _resume_in_queue(
    folder: RunFolder,
    plan: Plan,
    record: dict[str, Any],
    to: str,
    site_file: Path | None,
    options: JobOptions,
    hold: bool,
    from_scratch: bool,
) -> None:
    """Submit a job that goes on with the run; refused while another of its jobs waits or runs."""
    if to not in ("slurm", "kubernetes"):
        raise LaunchError(f"--to {to}: choose from local, slurm, kubernetes")
    for entry in record.get("jobs") or []:
        state = job_state(entry)
        if state is not None and not state.is_final:
            raise RunFolderError(
                f"{folder.path}: job {entry['id']} is {state.state.lower()}. Nearest: drumline cancel first, "
                "or wait for it"
            )
    with folder.locked():
        if from_scratch:
            folder.begin_anew()
        folder.write_recipe(plan.recipe.model_dump(by_alias=True))
    refuse_without(to, plan.recipe)
    stored = folder.path / SITE
    site = read_site(site_file or (stored if stored.is_file() else None), False, to, options)
    if to == "kubernetes":
        print(f"job {apply_again(plan, site, folder)}")
        return
    options = check_slurm(plan, site, options)
    print(f"job {submit_again(plan, site, folder, options, hold)}")


def _finish(folder: RunFolder, plan: Plan, cause: str, as_json: bool) -> None:
    """Run the attempts, report how the run ended, and exit with its code."""
    result, seconds = train_here(folder, plan, cause)
    report_end(folder, plan, result, seconds)
    if as_json:
        facts = run_facts(
            folder.path, result.step, result.loss, result.evaluation, seconds, result.outcome
        )
        print(json.dumps(facts))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("run")(run_command)
    app.command("resume")(resume_command)
