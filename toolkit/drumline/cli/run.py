"""`drumline run` and `drumline resume`."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.options import (
    AsJson,
    Force,
    FromRun,
    Gpus,
    GpuType,
    Hold,
    Overrides,
    RecipeArgument,
    SiteOfRun,
    SlurmAccount,
    SlurmPartition,
    SlurmQos,
    SlurmTime,
    TrustCode,
    with_from,
)
from drumline.cluster.site import facts_of, on_site
from drumline.errors import LaunchError, RunFolderError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe, override
from drumline.runs import folder as run_folder
from drumline.runs.closing import close_run
from drumline.runs.folder import RunFolder
from drumline.runs.record import new_record
from drumline.secrets import Secrets
from drumline.session.devices import check_gpus
from drumline.session.ending import report_end
from drumline.session.launch import (
    check_offered,
    refuse_secrets,
    refuse_what_cannot_start,
    refuse_what_does_not_fit,
    show_command,
    this_node,
)
from drumline.session.planning import make_plan, needs_data
from drumline.session.prepare import prepare_data
from drumline.session.show import plan_table, run_facts
from drumline.session.submit import submit_again, tell_submitted
from drumline.session.submit_checks import (
    JobOptions,
    check_fewest,
    check_slurm,
    refuse_while_queued,
    refuse_without,
    site_of_run,
)
from drumline.session.train_here import train_here
from drumline.session.trust import load_to_run, refuse_foreign_code
from drumline.session.unprepared import naming_prepare, tell_dry
from drumline.supervise.after import AfterWork
from drumline.supervise.outcome import STOPPED_EXIT_CODE
from drumline.supervise.signals import Signals
from drumline.supervise.supervisor import close_lost_attempt
from drumline_launchers.site import Site


def run_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    from_run: FromRun = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would start.")] = False,
    gpus: Gpus = None,
    gpu: GpuType = None,
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
    """Plan, then train on this machine with the recipe's launcher.

    Example: drumline run tiny-code-lm duration.steps=20 --run-dir mine
    """
    overrides = with_from(from_run, overrides)
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
        with naming_prepare(recipe, overrides):
            plan = make_plan(loaded, gpus, gpu)
        refuse_what_does_not_fit(plan, force, as_json)
        if dry_run:
            tell_dry(plan, recipe, overrides)
            return show_command(plan, run_dir, this_node(plan, node_rank, rendezvous), as_json)
    if gpu is None:
        check_gpus(loaded, wanted=1)
    prepare_data(loaded)
    plan = make_plan(loaded, gpus, gpu)
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
    site_file: SiteOfRun = None,
    time: SlurmTime = None,
    partition: SlurmPartition = None,
    account: SlurmAccount = None,
    qos: SlurmQos = None,
    hold: Hold = False,
    force: Force = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Resume from the newest sound checkpoint; split and strategy may change, the training may not.

    Example: drumline resume runs/tiny-code-lm-1 --gpus 1
    """
    folder = run_folder.open_run(run)
    if folder.read_record()["outcome"] == "finished":
        if _run_owed_commands(folder, str(run), trust_code):
            return None
        return _complete_record(folder)
    options = JobOptions(time=time, partition=partition, account=account, qos=qos, hold=hold)
    site = _site_to_resume(folder, site_file, to, trust_code, options)
    with folder.locked():
        recipe = override(folder.latest_recipe(), overrides)
        refuse_foreign_code(recipe, str(run), trust_code)
    if site is None:
        check_offered(recipe)
    else:
        recipe = on_site(recipe, site)
        refuse_without(to, recipe)
    prepare_data(recipe)
    plan = make_plan(recipe, gpus, start=folder.start_facts(), site=facts_of(site))
    _refuse_another_training(folder, plan, overrides)
    if site is None:
        refuse_what_cannot_start(plan, force, as_json)
    else:
        refuse_what_does_not_fit(plan, force, as_json)
    if to == "slurm":
        assert site
        check_fewest(plan, force, as_json)
        options = check_slurm(plan, site, options)
    _make_ready(folder, from_scratch)
    print(plan_table(plan), file=sys.stderr)
    if site is None:
        return _finish(folder, plan, "from scratch" if from_scratch else "resume", as_json)
    tell_submitted(folder, [submit_again(plan, site, folder, to, options)], to, as_json)


def _run_owed_commands(folder: RunFolder, where: str, trust_code: bool) -> bool:
    """Run the commands that checkpoints of a finished run are still owed; whether there were any."""
    plan = folder.latest_plan()
    if not plan.recipe.after:
        return False
    refuse_foreign_code(plan.recipe, where, trust_code)
    last = folder.steps_reached()
    with folder.locked(), Signals() as signals:
        work = AfterWork(folder, plan, lambda line: print(line, file=sys.stderr))
        try:
            if not work.tick(last):
                return False
            if not work.finish(signals, last):
                raise typer.Exit(STOPPED_EXIT_CODE)
        finally:
            work.stop()
        close_run(folder, lambda line: print(line, file=sys.stderr))
    print(
        f"{folder.path}: this run is finished; the commands that it owed have ended",
        file=sys.stderr,
    )
    return True


def _complete_record(folder: RunFolder) -> None:
    """Complete the record of a finished run that was killed before; RunFolderError if it is complete."""
    if folder.read_record().get("weights") is not None:
        run = shlex.quote(str(folder.path))
        duration = folder.latest_recipe().duration
        others = (("epochs", duration.epochs), ("tokens", duration.tokens))
        unset = "".join(f"duration.{name}=null " for name, value in others if value is not None)
        raise RunFolderError(
            f"{folder.path}: this run is finished, its schedule has ended, and it cannot be given more "
            f"steps. Nearest: `drumline run {run} --from {run} start_from.what=state {unset}"
            "duration.steps=N` makes another run that goes on from it"
        )
    with folder.locked():
        close_run(folder, lambda line: print(line, file=sys.stderr))
    print(f"{folder.path}: this run is finished; its record is complete now", file=sys.stderr)


def _site_to_resume(
    folder: RunFolder, file: Path | None, to: str, trust_code: bool, options: JobOptions
) -> Site | None:
    """The site of the job that goes on with the run; None if this machine does, where options are refused."""
    if to not in ("local", "slurm", "kubernetes"):
        raise LaunchError(f"--to {to}: choose from local, slurm, kubernetes")
    if to != "local":
        site = site_of_run(folder, file, to, trust_code, options)
        refuse_while_queued(folder)
        return site
    if unused := [*(["--site"] if file else []), *options.given]:
        raise LaunchError(
            f"{unused[0]}: a resume here uses none. Nearest: --to slurm, or without it"
        )
    return None


def _refuse_another_training(folder: RunFolder, plan: Plan, overrides: list[str] | None) -> None:
    """Raise RunFolderError if the overrides, or edited data, would make it another training."""
    record = folder.read_record()
    if plan.training_sha256 != record["training_sha256"]:
        raise RunFolderError(
            f"{folder.path}: {' '.join(overrides or [])} would make it another training. "
            "A resumed run may change the split, cluster, strategy and launcher only; `drumline run --from` "
            "begins another run with its state"
        )
    expected = record["data"]["fingerprint"]
    if plan.data.fingerprint != expected:
        raise RunFolderError(
            f"{folder.path}: the data have changed: fingerprint {expected} when the run began, "
            f"{plan.data.fingerprint} now"
        )


def _make_ready(folder: RunFolder, from_scratch: bool) -> None:
    """End what a killed attempt left, forget earlier restarts; `from_scratch`: keep what it had aside."""
    with folder.locked():
        close_lost_attempt(folder)
        folder.forget_restarts()
        kept = folder.begin_anew() if from_scratch else []
    if kept:
        names = ", ".join(path.name for path in kept)
        print(
            f"{folder.path}: begins again at step 1; what it had is kept as {names}",
            file=sys.stderr,
        )


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
