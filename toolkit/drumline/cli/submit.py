"""`drumline submit RECIPE --to slurm`: plans, creates the run folder, then renders and submits the job."""

import os
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
    SlurmAccount,
    SlurmPartition,
    SlurmQos,
    SlurmTime,
    TrustCode,
    with_from,
)
from drumline.cluster.site import facts_of, on_site
from drumline.errors import LaunchError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe, factories_of
from drumline.runs import folder as run_folder
from drumline.secrets import Secrets
from drumline.session.launch import refuse_secrets, refuse_what_does_not_fit
from drumline.session.planning import make_plan, needs_data
from drumline.session.prepare import prepare_data
from drumline.session.show import plan_table
from drumline.session.submit import dry_text, submit_all, tell_submitted
from drumline.session.submit_checks import (
    JobOptions,
    check_fewest,
    check_slurm,
    lacking_variables,
    read_site,
    refuse_without,
)
from drumline.session.trust import load_to_run
from drumline.session.unprepared import naming_prepare, tell_dry
from drumline_launchers.site import Site


def submit_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[
        str, typer.Option("--to", help="slurm, kubernetes, or skypilot (--dry-run only).")
    ] = "slurm",
    site_file: Annotated[
        Path | None, typer.Option("--site", help="A file about the cluster.")
    ] = None,
    gpus: Gpus = None,
    gpu: GpuType = None,
    from_run: FromRun = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    chain: Annotated[
        int, typer.Option("--chain", min=1, help="Slurm: N jobs, each after the one before.")
    ] = 1,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Slurm: measure the nodes' links before training.")
    ] = False,
    hold: Hold = False,
    time: SlurmTime = None,
    partition: SlurmPartition = None,
    account: SlurmAccount = None,
    qos: SlurmQos = None,
    job_name: Annotated[
        str | None, typer.Option("--job-name", help="Slurm: by default the run folder's name.")
    ] = None,
    dependency: Annotated[
        str | None, typer.Option("--dependency", help="Slurm's words: afterok:17, singleton.")
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option("--after", metavar="RUN", help="Slurm: start when that run has ended well."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, submit nothing.")
    ] = False,
    force: Force = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then submit to a cluster; a recipe that does not fit is not submitted (exit 3).

    Example: drumline submit llama-8b-8xh100 --to slurm --site site.yaml
    """
    if to not in ("slurm", "kubernetes", "skypilot"):
        raise LaunchError(f"--to {to}: choose from slurm, kubernetes, skypilot")
    if to == "skypilot" and not dry_run:
        raise LaunchError("--to skypilot: only with --dry-run; give its output to `sky launch`")
    overrides = with_from(from_run, overrides)
    options = JobOptions(
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        job_name=job_name,
        dependency=dependency,
        after=after,
        hold=hold,
        chain=chain,
    )
    site = read_site(site_file, preflight, to, options)
    read = load_recipe(recipe, overrides) if dry_run else load_to_run(recipe, overrides, trust_code)
    loaded, secrets = on_site(read, site), Secrets(os.environ)
    refuse_secrets(loaded, secrets)
    refuse_secrets(site, secrets)
    if run_dir is not None:
        run_folder.check_new(run_dir)
    with naming_prepare(recipe, overrides):
        plan = _planned(loaded, site, (gpus, gpu), "" if dry_run else to, force, as_json)
    if to == "slurm":
        check_fewest(plan, force, as_json)
    if dry_run:
        if lacking := lacking_variables(site):
            print(f"warning: {lacking}", file=sys.stderr)
        tell_dry(plan, recipe, overrides)
        print(dry_text(to, plan, site, run_dir, secrets), end="")
        return
    if to == "slurm":
        options = check_slurm(plan, site, options)
    print(plan_table(plan), file=sys.stderr)
    folder, jobs = submit_all(plan, site, run_dir, to, secrets, options)
    tell_submitted(folder, jobs, to, as_json)


def _planned(
    loaded: Recipe,
    site: Site,
    split: tuple[int | None, str | None],
    to: str,
    force: bool,
    as_json: bool,
) -> Plan:
    """The plan for this cluster, of prepared data; refused where it does not fit.

    `split`: --gpus and --gpu. `to`: where it is submitted to, empty for a dry run, which prepares nothing.
    Else the first micro-batch is tried here, too, unless the project's own code is in it, which may wait for
    other ranks or read what a launcher sets.
    """
    facts = facts_of(site)
    if to:
        refuse_without(to, loaded, prints=True)
        if not needs_data(loaded):
            refuse_what_does_not_fit(make_plan(loaded, *split, site=facts), force, as_json)
        prepare_data(loaded)
    plan = make_plan(loaded, *split, site=facts)
    refuse_what_does_not_fit(plan, force, as_json)
    if to and not (force or factories_of(loaded)):
        from drumline.train.dry_pass import dry_pass

        dry_pass(plan)
    return plan


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("submit")(submit_command)
