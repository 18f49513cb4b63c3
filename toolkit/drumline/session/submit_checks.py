"""What is checked before a job is submitted: the site, one submission's options, limits, nodes, programs."""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from drumline.cluster.limits import check_limits
from drumline.cluster.site import load_site, validate_site
from drumline.errors import DoesNotFit, LaunchError
from drumline.plan.model import Plan
from drumline.recipe.schema import NodeRange, Recipe
from drumline.runs.folder import open_run
from drumline.session.launch import check_offered, refuse_what_does_not_fit
from drumline.session.planning import plan_on_nodes
from drumline_launchers.site import Site


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
