"""`drumline submit RECIPE --to slurm`: plan, render, submit; the run folder comes before the job."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from launchers.slurm import Batch, render_script
from toolkit.cli.launch import check_offered, refuse_secrets, refuse_what_does_not_fit
from toolkit.cli.plan import AsJson, Overrides, RecipeArgument, make_plan, prepare_data
from toolkit.cli.run import Force
from toolkit.cli.show import plan_table
from toolkit.errors import LaunchError, PlanError
from toolkit.files import write_text
from toolkit.plan.model import Plan
from toolkit.recipe import yaml12
from toolkit.recipe.load import load_recipe
from toolkit.recipe.schema import NodeRange, Recipe
from toolkit.runs import folder as run_folder
from toolkit.runs import slurm
from toolkit.runs.folder import RunFolder
from toolkit.runs.record import new_record, now
from toolkit.secrets import Secrets
from toolkit.site import Site, load_site, validate_site

SCRIPT = "job.sh"
SITE = "site.yaml"


def submit_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option("--to", help="slurm")] = "slurm",
    site: Annotated[Path | None, typer.Option("--site", help="A file about the cluster.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    chain: Annotated[
        int, typer.Option("--chain", min=1, help="So many jobs, each after the one before.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, submit nothing.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then submit to a cluster; a recipe that does not fit is not submitted (exit 3)."""
    if to != "slurm":
        raise LaunchError(f"--to {to}: this release submits to slurm")
    place = load_site(site) if site else validate_site({"site": "default"}, "default site")
    loaded = _on_site(load_recipe(recipe, overrides), place)
    secrets = Secrets(os.environ)
    refuse_secrets(loaded, secrets)
    if run_dir is not None:
        run_folder.check_new(run_dir)
    if not dry_run:
        check_offered(loaded)
        if shutil.which("sbatch") is None:
            slurm.submit(Path(SCRIPT))  # which says so, before anything is prepared or written
        prepare_data(loaded)
    plan = make_plan(loaded)
    refuse_what_does_not_fit(plan, force, as_json)
    if dry_run:
        folder = RunFolder((run_dir or _runs(place) / f"{plan.recipe.recipe}-N").absolute())
        print(render_script(plan, place, _batch(plan, folder, None)), end="")
        return
    print(plan_table(plan), file=sys.stderr)
    folder = run_folder.create(plan.recipe, run_dir, _runs(place))
    jobs: list[str] = []
    try:
        folder.write_record({**new_record(plan, sys.argv, secrets), "jobs": []})
        write_text(folder.path / SITE, yaml12.dump(place.model_dump()))
        for _ in range(chain):
            jobs.append(_submit_one(plan, place, folder, jobs))
    except BaseException:  # all of the chain or nothing
        for job in jobs:
            slurm.cancel(job, gently=False)
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    _tell(folder, jobs, as_json)


def _submit_one(plan: Plan, site: Site, folder: RunFolder, before: list[str]) -> str:
    """A job that waits for the last of those before it; in the record as soon as it is submitted."""
    path = folder.path / (f"job-{len(before)}.sh" if before else SCRIPT)
    after = before[-1] if before else None
    write_text(path, render_script(plan, site, _batch(plan, folder, after)))
    job = slurm.submit(path)
    entries = folder.read_record()["jobs"]
    folder.note(jobs=[*entries, {"target": "slurm", "id": job, "submitted": now()}])
    return job


def _on_site(recipe: Recipe, site: Site) -> Recipe:
    """The recipe with the site's hardware where it names none; PlanError where the two disagree."""
    cluster = recipe.cluster
    update: dict[str, str | int] = {}
    if site.gpu and "gpu" not in cluster.model_fields_set:
        update["gpu"] = site.gpu
    elif site.gpu and site.gpu != cluster.gpu:
        raise PlanError(
            f"cluster.gpu: the recipe says {cluster.gpu}, site {site.site} has {site.gpu}. "
            f"Nearest: cluster.gpu={site.gpu}"
        )
    if site.gpus_per_node and cluster.gpus_per_node is None:
        update["gpus_per_node"] = site.gpus_per_node
    elif site.gpus_per_node and (cluster.gpus_per_node or 0) > site.gpus_per_node:
        raise PlanError(
            f"cluster.gpus_per_node: {cluster.gpus_per_node}, nodes of site {site.site} have "
            f"{site.gpus_per_node}. Nearest: cluster.gpus_per_node={site.gpus_per_node}"
        )
    return recipe.model_copy(update={"cluster": cluster.model_copy(update=update)})


def _batch(plan: Plan, folder: RunFolder, after: str | None) -> Batch:
    nodes = plan.recipe.cluster.nodes
    is_range = isinstance(nodes, NodeRange)
    return Batch(
        run_folder=folder.path,
        python=sys.executable,
        package=Path(__file__).resolve().parents[2],
        fewest=nodes.min if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        most=nodes.max if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        after=after,
    )


def _runs(site: Site) -> Path:
    return Path(site.runs) if site.runs else Path.cwd() / "runs"


def _tell(folder: RunFolder, jobs: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": str(folder.path), "jobs": jobs}))
        return
    shown = shlex.quote(str(folder.path))
    print(f"job {', '.join(jobs)}, script {shown}/{SCRIPT}")
    print(f"the folder must be on a file system that all nodes see: {shown}", file=sys.stderr)
    print(f"next  drumline status {shown}, drumline logs -f {shown}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("submit")(submit_command)
