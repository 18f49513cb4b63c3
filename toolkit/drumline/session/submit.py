"""Submits to a cluster: creates the run folder, then its script or manifests, then the jobs."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.cluster import slurm
from drumline.cluster.limits import check_limits
from drumline.cluster.site import load_site, validate_site
from drumline.errors import DoesNotFit, LaunchError
from drumline.files import read_bytes, write_text
from drumline.plan.model import Plan
from drumline.processes import SOURCE_ROOTS
from drumline.recipe import yaml12
from drumline.recipe.schema import NodeRange, Recipe, factories_of
from drumline.runs import folder as run_folder
from drumline.runs.code import factory_hashes
from drumline.runs.folder import RunFolder, open_run
from drumline.runs.freeze import CODE_TEXT, freeze_project, frozen_text
from drumline.runs.record import new_record, now
from drumline.secrets import Secrets
from drumline.session.launch import check_offered, refuse_what_does_not_fit
from drumline.session.planning import plan_on_nodes
from drumline.session.trust import remember_project
from drumline_launchers.kubernetes import check_manifests, render_manifests
from drumline_launchers.site import Site
from drumline_launchers.skypilot import render_task
from drumline_launchers.slurm import Batch, render_command_script, render_script

SCRIPT, MANIFESTS = "job.sh", "manifests.yaml"

SITE = "site.yaml"
CODE = "code"
"""The copy of the project's code in a run folder."""

_LONGEST_LABEL = 50
"""Kubernetes allows names of 63 characters; a JobSet appends some for its pods."""


@dataclass(frozen=True)
class JobOptions:
    """What a single submission says beside the site: each None where the site's word holds.

    `dependency` is in Slurm's words, such as afterok:17; `after` a run whose jobs must end well first.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str | None = None
    dependency: str | None = None
    after: Path | None = None

    @property
    def of_the_site(self) -> dict[str, str]:
        """Those that replace a key of the site."""
        found = {
            "time_limit": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
        }
        return {key: value for key, value in found.items() if value is not None}


NO_OPTIONS = JobOptions()


def read_site(
    file: Path | None, preflight: bool, to: str, options: JobOptions = NO_OPTIONS
) -> Site:
    """Load the site file (None: an empty site), apply the options, and `--preflight`, for Slurm only."""
    site = load_site(file) if file else validate_site({"site": "default"}, "default site")
    if to != "slurm" and options != NO_OPTIONS:
        raise LaunchError(
            f"--to {to}: --time, --partition, --after … are Slurm's. Nearest: --to slurm"
        )
    if options.of_the_site:
        plain = {**site.model_dump(exclude_unset=True), **options.of_the_site}
        site = validate_site(plain, "options")
    if preflight:
        site = site.model_copy(update={"preflight": True})
    if site.preflight and to != "slurm":
        raise LaunchError(
            f"--preflight: not with --to {to}. Nearest: --to slurm, or in a pod "
            "drumline doctor --preflight"
        )
    return site


def lacking_variables(site: Site) -> str:
    """Say which variables under the site's `environment` are not set here; "" if all are."""
    lacking = [name for name in site.environment if name not in os.environ]
    if not lacking:
        return ""
    return (
        f"environment: {lacking[0]} is not set here, so the job would not get it. Nearest: "
        f"export {lacking[0]}, or leave it out of the site"
    )


def check_slurm(plan: Plan, site: Site, options: JobOptions = NO_OPTIONS) -> JobOptions:
    """Raise LaunchError if the job could never start, or a variable of the site is not set here.

    Nothing is written before. Returns the options with `after` as a dependency on that run's jobs.
    """
    if lacking := lacking_variables(site):
        raise LaunchError(lacking)
    nodes = plan.recipe.cluster.nodes
    check_limits(plan, site, nodes.min if isinstance(nodes, NodeRange) else plan.batch.nodes)
    if options.after is None:
        return options
    jobs = open_run(options.after).read_record().get("jobs") or []
    ids = [entry["id"] for entry in jobs if entry["target"] == "slurm"]
    if not ids:
        raise LaunchError(
            f"--after {options.after}: this run has no job in Slurm. Nearest: without --after"
        )
    words = f"afterok:{ids[-1]}"
    return dataclasses.replace(
        options, after=None, dependency=",".join(filter(None, [options.dependency, words]))
    )


def submit_all(
    plan: Plan,
    site: Site,
    run_dir: Path | None,
    to: str,
    secrets: Secrets,
    chain: int,
    hold: bool,
    options: JobOptions = NO_OPTIONS,
) -> tuple[RunFolder, list[str]]:
    """Create the run folder and submit its jobs; on an error, cancel Slurm jobs and delete the folder."""
    folder = run_folder.create(plan.recipe, run_dir, runs_of(site))
    jobs: list[str] = []
    try:
        plan = prepare_folder(plan, site, folder, secrets)
        if to == "kubernetes":
            jobs.append(_apply(plan, site, folder))
        for _ in range(chain if to == "slurm" else 0):
            jobs.append(_submit_one(plan, site, folder, jobs, hold, chain, options))
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
    write_text(folder.path / SITE, yaml12.dump(site.model_dump()))
    (folder.path / "logs").mkdir()
    return plan


def check_fewest(plan: Plan, force: bool, as_json: bool) -> None:
    """Check the smallest allocation of `cluster.nodes`, where memory per rank is highest.

    DoesNotFit if it does not fit; a warning on stderr if some of its nodes would idle.
    """
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
    """Raise LaunchError if a needed package, or the program that submits, is not installed.

    Called before anything is prepared or written.
    """
    check_offered(recipe)
    program = {"slurm": "sbatch", "kubernetes": "kubectl"}[to]
    if shutil.which(program) is None:
        raise LaunchError(
            f"{program} is not on this machine's PATH. Nearest: submit from a login node of the cluster, or "
            "--dry-run and take what it prints there"
        )


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
        return _manifest_text(_manifests(plan, site, name, record, code))


def _manifests(
    plan: Plan, site: Site, name: str, record: dict[str, Any], code: Path
) -> list[dict[str, Any]]:
    """Render the manifests; the frozen `code`, if there is any, is passed on as text with the recipe."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST_LABEL].strip("-")
    if not label:
        raise LaunchError(f"{name}: no name for Kubernetes is in it. Nearest: another --run-dir")
    recipe, files = plan.recipe, {}
    if code.is_dir() and site.kubernetes:
        project = f"{site.kubernetes.mount.rstrip('/')}/{label}/{CODE}"
        recipe = recipe.model_copy(update={"project": project})
        files[CODE_TEXT] = json.dumps(frozen_text(code))
    plain = recipe.model_dump(by_alias=True)
    files |= {
        "recipe.yaml": yaml12.dump(plain),
        "record.json": json.dumps({**record, "recipe": plain}),
        SITE: yaml12.dump(site.model_dump()),
    }
    found = render_manifests(plan, site, label, files)
    check_manifests(found)
    return found


def _manifest_text(manifests: list[dict[str, Any]]) -> str:
    return "---\n".join(yaml12.dump(manifest) for manifest in manifests)


def _apply(plan: Plan, site: Site, folder: RunFolder) -> str:
    """Run `kubectl apply` on the manifests, keep them in the run folder, and return the object's name."""
    name = folder.path.name
    manifests = _manifests(plan, site, name, folder.read_record(), folder.path / CODE)
    text = _manifest_text(manifests)
    write_text(folder.path / MANIFESTS, text)
    _kubectl(["apply", "-f", "-"], text)
    kind, meta = manifests[-1]["kind"].lower(), manifests[-1]["metadata"]
    entry = {"target": "kubernetes", "id": f"{kind}/{meta['name']}", "namespace": meta["namespace"]}
    folder.add_job({**entry, "submitted": now()})
    return str(entry["id"])


def submit_again(plan: Plan, site: Site, folder: RunFolder, options: JobOptions, hold: bool) -> str:
    """Submit another job for an existing run, which goes on from its newest checkpoint; return its id."""
    write_text(folder.path / SITE, yaml12.dump(site.model_dump()))
    return _submit_one(plan, site, folder, [], hold, 1, options)


def submit_export(folder: RunFolder, target: Path, best: bool, site: Site | None) -> str:
    """Submit a job that exports the run to `target` once its jobs have ended well; return the job's id."""
    stored, record = folder.path / SITE, folder.read_record()
    site = site or read_site(stored if stored.is_file() else None, preflight=False, to="slurm")
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
            f"{folder.path}: this run never started. Nearest: drumline status {folder.path}"
        )
    arguments = [
        "export",
        str(folder.path),
        str(target.absolute()),
        *(["--best"] if best else []),
        "--trust-code",
    ]
    script = folder.path / "export.sh"
    output = folder.path / "logs" / "export-%j.out"
    write_text(
        script, render_command_script(site, f"export-{folder.path.name}", arguments, batch, output)
    )
    return slurm.submit(script)


def apply_again(folder: RunFolder) -> str:
    """Give the run's manifests to Kubernetes again, replacing the object that has ended; return its name."""
    path = folder.path / MANIFESTS
    if not path.is_file():
        raise LaunchError(f"{path}: is missing. Nearest: drumline submit the recipe again")
    text = read_bytes(path).decode()
    _kubectl(["delete", "--ignore-not-found", "--wait", "-f", "-"], text)
    _kubectl(["apply", "-f", "-"], text)
    last = [entry for entry in folder.read_record()["jobs"] if entry["target"] == "kubernetes"][-1]
    folder.add_job({**last, "submitted": now()})
    return str(last["id"])


def _kubectl(arguments: list[str], text: str) -> None:
    command = ["kubectl", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or "it printed no error").splitlines()[-1]
        raise LaunchError(f"kubectl {arguments[0]}: {words}")


def _submit_one(
    plan: Plan,
    site: Site,
    folder: RunFolder,
    before: list[str],
    hold: bool,
    chain: int,
    options: JobOptions,
) -> str:
    """Submit a job that waits for the last of `before`, record it, and return its id."""
    path = folder.path / (f"job-{len(before)}.sh" if before else SCRIPT)
    after = before[-1] if before else None
    batch = dataclasses.replace(
        batch_of(plan, [folder], after, is_followed=len(before) + 1 < chain),
        name=options.job_name,
        dependency=None if before else options.dependency,
    )
    write_text(path, render_script(plan, site, batch))
    job = slurm.submit(path, hold)
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
