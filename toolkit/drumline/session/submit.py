"""Submits to a cluster: creates the run folder, then its script or manifests, then the jobs."""

import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from drumline.cluster import slurm
from drumline.errors import LaunchError
from drumline.files import write_text
from drumline.plan.model import Plan
from drumline.processes import SOURCE_ROOTS
from drumline.recipe import yaml12
from drumline.recipe.schema import NodeRange, factories_of
from drumline.runs import folder as run_folder
from drumline.runs.code import CODE, factory_hashes
from drumline.runs.folder import RunFolder
from drumline.runs.freeze import freeze_project
from drumline.runs.record import new_record, now
from drumline.secrets import Secrets
from drumline.session.manifests import MANIFESTS, apply, apply_again, manifest_text, manifests_of
from drumline.session.submit_checks import NO_OPTIONS, JobOptions
from drumline.session.trust import remember_folder, remember_project
from drumline_launchers.site import SITE, Site
from drumline_launchers.skypilot import render_task
from drumline_launchers.slurm import Batch, render_command_script, render_script

SCRIPT = "job.sh"


def submit_all(
    plan: Plan,
    site: Site,
    run_dir: Path | None,
    to: str,
    secrets: Secrets,
    options: JobOptions = NO_OPTIONS,
) -> tuple[RunFolder, list[str]]:
    """Create the run folder and submit its jobs; on an error, cancel Slurm jobs and delete the folder."""
    folder = run_folder.create(plan.recipe, run_dir, runs_of(site))
    jobs: list[str] = []
    try:
        plan = prepare_folder(plan, site, folder, secrets)
        if to == "kubernetes":
            jobs.append(apply(plan, site, folder))
        for _ in range(options.chain if to == "slurm" else 0):
            jobs.append(_submit_one(plan, site, folder, jobs, options))
    except BaseException:
        for job in jobs if to == "slurm" else []:
            slurm.cancel(job, gently=False)
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder, jobs


def prepare_folder(plan: Plan, site: Site, folder: RunFolder, secrets: Secrets) -> Plan:
    """Write what a job needs into its new run folder: code, recipe, record, site; return its plan.

    The project's code is copied, and the recipe in the folder names the copy.
    """
    record = {**new_record(plan, sys.argv, secrets), "jobs": []}
    if plan.recipe.project and factories_of(plan.recipe):
        target = folder.path / CODE
        frozen = freeze_project(Path(plan.recipe.project), target)
        for name, why in frozen.left_out.items():
            print(f"not copied for the job: {name}: {why}", file=sys.stderr)
        recipe = plan.recipe.model_copy(update={"project": str(target)})
        if factory_hashes(recipe) != record["code"]["factories"]:
            raise LaunchError(
                f"{plan.recipe.project}: a file that the recipe's factories run was not copied. Nearest: put "
                "it into the project as a regular file"
            )
        plan = dataclasses.replace(plan, recipe=recipe)
        remember_project(recipe)
        plain = recipe.model_dump(by_alias=True)
        folder.write_recipe(plain)
        record["recipe"] = plain
    folder.write_record(record)
    remember_folder(folder.path)
    write_text(folder.path / SITE, yaml12.dump(site.to_plain()))
    (folder.path / "logs").mkdir()
    return plan


def dry_text(to: str, plan: Plan, site: Site, run_dir: Path | None, secrets: Secrets) -> str:
    """Return the script, task or manifests that would be submitted."""
    folder = RunFolder((run_dir or runs_of(site) / f"{plan.recipe.recipe}-N").absolute())
    if to == "slurm":
        return render_script(plan, site, batch_of(plan, [folder]))
    if to == "skypilot":
        return yaml12.dump(render_task(plan, site, folder.recipe_file))
    record = new_record(plan, sys.argv, secrets)
    name = run_dir.name if run_dir else plan.recipe.recipe
    with tempfile.TemporaryDirectory(prefix="drumline-code-") as where:
        code = Path(where) / CODE
        if plan.recipe.project and factories_of(plan.recipe):
            freeze_project(Path(plan.recipe.project), code)
        return manifest_text(manifests_of(plan, site, name, record, code))


def submit_again(
    plan: Plan, site: Site, folder: RunFolder, to: str, options: JobOptions = NO_OPTIONS
) -> str:
    """Submit another job for an existing run, which goes on from its newest checkpoint; return its id."""
    folder.write_recipe(plan.recipe.model_dump(by_alias=True))
    write_text(folder.path / SITE, yaml12.dump(site.to_plain()))
    remember_folder(folder.path)
    if to == "kubernetes":
        return apply_again(plan, site, folder)
    return _submit_one(plan, site, folder, [], options)


def submit_export(folder: RunFolder, target: Path, options: list[str], site: Site) -> str:
    """Submit a job that exports the run to `target` once its jobs have ended well; return the job's id.

    `options`: of `drumline export`.
    """
    record = folder.read_record()
    jobs = [entry["id"] for entry in record.get("jobs") or [] if entry["target"] == "slurm"]
    state = slurm.job_state(jobs[-1]) if jobs else None
    batch = Batch(
        run_folders=[folder.path],
        python=sys.executable,
        import_path=list(SOURCE_ROOTS),
        fewest=1,
        most=1,
        dependency=f"afterok:{jobs[-1]}" if state and not state.is_final else None,
    )
    if not record["attempts"] and batch.dependency is None:
        raise LaunchError(
            f"{folder.path}: this run never started. Nearest: drumline status "
            f"{shlex.quote(str(folder.path))}"
        )
    arguments = [
        "export",
        str(folder.path),
        str(target.absolute()),
        *options,
        "--trust-code",
    ]
    script = folder.path / "export.sh"
    output = folder.path / "logs" / "export-%j.out"
    write_text(
        script, render_command_script(site, f"export-{folder.path.name}", arguments, batch, output)
    )
    return slurm.submit(script)


def tell_submitted(folder: RunFolder, jobs: list[str], to: str, as_json: bool) -> None:
    """Print what was submitted, and the next two commands; as JSON the run folder and the jobs."""
    if as_json:
        print(json.dumps({"run": str(folder.path), "jobs": jobs}))
        return
    shown = shlex.quote(str(folder.path))
    print(f"job {', '.join(jobs)}, script {shown}/{MANIFESTS if to == 'kubernetes' else SCRIPT}")
    print(f"the folder must be on a file system that all nodes see: {shown}", file=sys.stderr)
    print(f"next  drumline status {shown}, drumline logs -f {shown}", file=sys.stderr)


def _submit_one(
    plan: Plan,
    site: Site,
    folder: RunFolder,
    before: list[str],
    options: JobOptions,
) -> str:
    """Submit a job that waits for the last of `before`, record it, and return its id."""
    path = folder.path / (f"job-{len(before)}.sh" if before else SCRIPT)
    after = before[-1] if before else None
    batch = dataclasses.replace(
        batch_of(plan, [folder], after, is_followed=len(before) + 1 < options.chain),
        name=options.job_name,
        dependency=None if before else options.dependency,
    )
    write_text(path, render_script(plan, site, batch))
    job = slurm.submit(path, options.hold)
    folder.add_job({"target": "slurm", "id": job, "submitted": now()})
    return job


def batch_of(
    plan: Plan,
    folders: list[RunFolder],
    after: str | None = None,
    is_followed: bool = False,
    at_most: int | None = None,
) -> Batch:
    """Collect what the batch script needs besides plan and site."""
    nodes = plan.recipe.cluster.nodes
    is_range = isinstance(nodes, NodeRange)
    return Batch(
        run_folders=[folder.path for folder in folders],
        python=sys.executable,
        import_path=list(SOURCE_ROOTS),
        fewest=nodes.min if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        most=nodes.max if is_range else plan.batch.nodes,  # type: ignore[union-attr]
        after=after,
        is_followed=is_followed,
        at_most=at_most,
    )


def runs_of(site: Site) -> Path:
    """Return the folder in which run folders are created."""
    return Path(site.runs) if site.runs else Path.cwd() / "runs"
