"""`drumline submit RECIPE --to slurm`: plan, render, submit; the run folder comes before the job."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.kubernetes import check_manifests, render_manifests
from launchers.skypilot import render_task
from launchers.slurm import Batch, render_script
from toolkit.cli.launch import check_offered, refuse_secrets, refuse_what_does_not_fit
from toolkit.cli.plan import (
    AsJson,
    Overrides,
    RecipeArgument,
    make_plan,
    plan_on_nodes,
    prepare_data,
)
from toolkit.cli.run import Force, needs_data
from toolkit.cli.show import plan_table
from toolkit.errors import DoesNotFit, LaunchError, PlanError
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
_LONGEST_LABEL = 50
"""Kubernetes allows 63 letters, of which a JobSet takes some for its pods."""


def submit_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[
        str, typer.Option("--to", help="slurm, kubernetes, or skypilot (--dry-run only).")
    ] = "slurm",
    site: Annotated[Path | None, typer.Option("--site", help="A file about the cluster.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    chain: Annotated[
        int, typer.Option("--chain", min=1, help="So many jobs, each after the one before.")
    ] = 1,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Slurm: measure the nodes' links before training.")
    ] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Submitted, but not started yet.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, submit nothing.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then submit to a cluster; a recipe that does not fit is not submitted (exit 3)."""
    if to not in ("slurm", "kubernetes", "skypilot"):
        raise LaunchError(f"--to {to}: choose from slurm, kubernetes, skypilot")
    if to == "skypilot" and not dry_run:
        raise LaunchError("--to skypilot: only with --dry-run; give its output to `sky launch`")
    place = _place(site, preflight, to)
    loaded = on_site(load_recipe(recipe, overrides), place)
    secrets = Secrets(os.environ)
    refuse_secrets(loaded, secrets)
    refuse_secrets(place, secrets)
    if run_dir is not None:
        run_folder.check_new(run_dir)
    if not dry_run:
        refuse_without(to, loaded)
        if not needs_data(loaded):
            refuse_what_does_not_fit(make_plan(loaded), force, as_json)
        prepare_data(loaded)
    plan = make_plan(loaded)
    refuse_what_does_not_fit(plan, force, as_json)
    if to == "slurm":
        _check_fewest(plan, force, as_json)
    if dry_run:
        print(_dry_text(to, plan, place, run_dir, secrets), end="")
        return
    print(plan_table(plan), file=sys.stderr)
    folder, jobs = _submit_all(plan, place, run_dir, to, secrets, chain, hold)
    _tell(folder, jobs, as_json)


def _place(file: Path | None, preflight: bool, to: str) -> Site:
    """The site of the file, or one that says nothing, with what the command line adds."""
    site = load_site(file) if file else validate_site({"site": "default"}, "default site")
    if preflight:
        site = site.model_copy(update={"preflight": True})
    if site.preflight and to != "slurm":
        raise LaunchError(
            f"--preflight: not with --to {to}. Nearest: --to slurm, or in a pod "
            "drumline doctor --preflight"
        )
    return site


def _submit_all(
    plan: Plan,
    place: Site,
    run_dir: Path | None,
    to: str,
    secrets: Secrets,
    chain: int,
    hold: bool,
) -> tuple[RunFolder, list[str]]:
    """The run folder, then its jobs; all of a chain or nothing."""
    folder = run_folder.create(plan.recipe, run_dir, runs_of(place))
    jobs: list[str] = []
    try:
        folder.write_record({**new_record(plan, sys.argv, secrets), "jobs": []})
        write_text(folder.path / SITE, yaml12.dump(place.model_dump()))
        if to == "kubernetes":
            jobs.append(_apply(plan, place, folder))
        for _ in range(chain if to == "slurm" else 0):
            jobs.append(_submit_one(plan, place, folder, jobs, hold, chain))
    except BaseException:
        for job in jobs if to == "slurm" else []:
            slurm.cancel(job, gently=False)
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder, jobs


def _check_fewest(plan: Plan, force: bool, as_json: bool) -> None:
    """On the fewest nodes that Slurm may give, where a rank holds most: does it fit, and do nodes idle?"""
    nodes = plan.recipe.cluster.nodes
    if not isinstance(nodes, NodeRange):
        return
    fewest = plan_on_nodes(plan.recipe, nodes.min)
    try:
        refuse_what_does_not_fit(fewest, force, as_json)
    except DoesNotFit as error:
        raise DoesNotFit(
            f"on {fewest.batch.nodes} of cluster.nodes {nodes.min} to {nodes.max}: {error}"
        ) from None
    idle = nodes.min - fewest.batch.nodes
    if idle:
        print(
            f"warning: given {nodes.min} nodes, {idle} would idle: effective {plan.batch.effective} can be "
            f"split over {fewest.batch.nodes} of them at most",
            file=sys.stderr,
        )


def refuse_without(to: str, recipe: Recipe) -> None:
    """LaunchError before anything is prepared or written, where what submits is not here."""
    check_offered(recipe)
    program = {"slurm": "sbatch", "kubernetes": "kubectl"}[to]
    if shutil.which(program) is None:
        raise LaunchError(
            f"{program} is not on this machine's PATH. Nearest: submit from a login node of the cluster, or "
            "--dry-run and take what it prints there"
        )


def _dry_text(to: str, plan: Plan, site: Site, run_dir: Path | None, secrets: Secrets) -> str:
    """What would be submitted."""
    folder = RunFolder((run_dir or runs_of(site) / f"{plan.recipe.recipe}-N").absolute())
    if to == "slurm":
        return render_script(plan, site, batch_of(plan, [folder]))
    if to == "skypilot":
        return yaml12.dump(render_task(plan, site, folder.recipe_file))
    record = new_record(plan, sys.argv, secrets)
    name = run_dir.name if run_dir else plan.recipe.recipe
    return _manifest_text(_manifests(plan, site, name, record))


def _manifests(plan: Plan, site: Site, name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    files = {
        "recipe.yaml": yaml12.dump(plan.recipe.model_dump(by_alias=True)),
        "record.json": json.dumps(record),
        SITE: yaml12.dump(site.model_dump()),
    }
    label = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST_LABEL].strip("-")
    if not label:
        raise LaunchError(f"{name}: no name for Kubernetes is in it. Nearest: another --run-dir")
    found = render_manifests(plan, site, label, files)
    check_manifests(found)
    return found


def _manifest_text(manifests: list[dict[str, Any]]) -> str:
    return "---\n".join(yaml12.dump(manifest) for manifest in manifests)


def _apply(plan: Plan, site: Site, folder: RunFolder) -> str:
    """`kubectl apply` of the manifests, which stay in the run folder; the object's name."""
    name = folder.path.name
    manifests = _manifests(plan, site, name, folder.read_record())
    text = _manifest_text(manifests)
    write_text(folder.path / "manifests.yaml", text)
    command = ["kubectl", "apply", "-f", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"kubectl apply: {(done.stderr.strip() or 'no word of why').splitlines()[-1]}"
        )
    kind, meta = manifests[-1]["kind"].lower(), manifests[-1]["metadata"]
    entry = {"target": "kubernetes", "id": f"{kind}/{meta['name']}", "namespace": meta["namespace"]}
    folder.note(jobs=[{**entry, "submitted": now()}])
    return str(entry["id"])


def _submit_one(
    plan: Plan, site: Site, folder: RunFolder, before: list[str], hold: bool, chain: int
) -> str:
    """A job that waits for the last of those before it; in the record as soon as it is submitted."""
    path = folder.path / (f"job-{len(before)}.sh" if before else SCRIPT)
    after = before[-1] if before else None
    batch = batch_of(plan, [folder], after, is_followed=len(before) + 1 < chain)
    write_text(path, render_script(plan, site, batch))
    job = slurm.submit(path, hold)
    entries = folder.read_record()["jobs"]
    folder.note(jobs=[*entries, {"target": "slurm", "id": job, "submitted": now()}])
    return job


def on_site(recipe: Recipe, site: Site) -> Recipe:
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


def batch_of(
    plan: Plan, folders: list[RunFolder], after: str | None = None, is_followed: bool = False
) -> Batch:
    """What the script needs beside plan and site."""
    nodes = plan.recipe.cluster.nodes
    is_range = isinstance(nodes, NodeRange)
    return Batch(
        run_folders=[folder.path for folder in folders],
        python=sys.executable,
        package=Path(__file__).resolve().parents[2],
        fewest=nodes.min if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        most=nodes.max if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        after=after,
        is_followed=is_followed,
    )


def runs_of(site: Site) -> Path:
    """Where run folders go."""
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
