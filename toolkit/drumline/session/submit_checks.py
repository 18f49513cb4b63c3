"""What is checked before a job is submitted: the site, one submission's options, limits, nodes, programs."""

import dataclasses
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from drumline.cluster.jobs import job_state
from drumline.cluster.limits import check_limits
from drumline.cluster.site import load_site, validate_site
from drumline.errors import DoesNotFit, LaunchError, RunFolderError
from drumline.plan.model import Plan
from drumline.recipe.schema import NodeRange, Recipe
from drumline.runs.folder import RunFolder, open_run
from drumline.secrets import Secrets
from drumline.session.launch import check_offered, refuse_secrets, refuse_what_does_not_fit
from drumline.session.planning import plan_on_nodes
from drumline.session.trust import refuse_foreign_site
from drumline_launchers.site import SITE, Site

_PATTERNS = {
    "job_name": r"[A-Za-z0-9_./+@,=: -]{1,200}",
    "dependency": r"[a-z_:0-9,?+]{1,1000}",
}


@dataclass(frozen=True)
class JobOptions:
    """What a single submission to Slurm says beside the site: None where the site's word holds.

    `dependency` is in Slurm's words, such as afterok:17; `after` a run whose jobs must end well first;
    `chain` the number of jobs, each after the one before. LaunchError for a value that cannot stand in a
    script; the site's schema checks those that replace a key of it.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str | None = None
    dependency: str | None = None
    after: Path | None = None
    hold: bool = False
    chain: int = 1

    def __post_init__(self) -> None:
        for name, pattern in _PATTERNS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                shown = name.replace("_", "-")
                raise LaunchError(f"--{shown} {value!r}: cannot stand in a job script")

    @property
    def given(self) -> list[str]:
        """The options that were given, as on the command line: `--job-name`."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]

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
    if to != "slurm" and options.given:
        raise LaunchError(
            f"--to {to}: {options.given[0]} is Slurm's. Nearest: --to slurm, or without it"
        )
    if options.of_the_site:
        plain = {**site.to_plain(only_stated=True), **options.of_the_site}
        site = validate_site(plain, "options")
    if preflight:
        site = site.model_copy(update={"preflight": True})
    if site.preflight and to != "slurm":
        raise LaunchError(
            f"--preflight: not with --to {to}. Nearest: --to slurm, or in a pod "
            "drumline doctor --preflight"
        )
    return site


def site_of_run(
    folder: RunFolder,
    file: Path | None,
    to: str,
    trust_code: bool,
    options: JobOptions = NO_OPTIONS,
) -> Site:
    """The site of another job of a run: `file`, else the copy in the run folder, else an empty site.

    RecipeError for a copy that this user did not submit, since it can name commands, and for secrets.
    """
    stored = folder.path / SITE
    if file is None and stored.is_file():
        refuse_foreign_site(folder.path, trust_code)
        file = stored
    site = read_site(file, False, to, options)
    refuse_secrets(site, Secrets(os.environ))
    return site


def refuse_while_queued(folder: RunFolder) -> None:
    """Raise RunFolderError while a job of the run waits or runs: two would train one run."""
    for entry in folder.read_record().get("jobs") or []:
        state = job_state(entry)
        if state is not None and not state.is_final:
            raise RunFolderError(
                f"{folder.path}: job {entry['id']} is {state.state.lower()}. Nearest: drumline cancel first, "
                "or wait for it"
            )


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


def refuse_without(to: str, recipe: Recipe, prints: bool = False) -> None:
    """Raise LaunchError if a needed package, or the program that submits, is not installed.

    Called before anything is prepared or written. `prints`: the command's --dry-run prints what it would
    submit.
    """
    check_offered(recipe)
    program = {"slurm": "sbatch", "kubernetes": "kubectl"}[to]
    if shutil.which(program) is None:
        instead = ", or --dry-run and take what it prints there" if prints else ""
        raise LaunchError(
            f"{program} is not on this machine's PATH. Nearest: submit from a login node of the "
            f"cluster{instead}"
        )
