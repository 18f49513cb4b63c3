"""Supervises a run from the first node of its job, on the nodes that the scheduler allocated."""

import contextlib
import os
import sys
from dataclasses import dataclass

from drumline.cluster import slurm
from drumline.cluster.preflight import slow_nodes, table
from drumline.cluster.site import facts_of, load_site
from drumline.errors import LaunchError, PlanError, RunFolderError
from drumline.plan.model import NO_SITE, Plan
from drumline.processes import free_port
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import NodeRange, Recipe
from drumline.runs.folder import RunFolder
from drumline.runs.record import now
from drumline.session import members
from drumline.session.ending import report_end
from drumline.session.links import links_of, slow_words
from drumline.session.planning import make_plan, plan_on_nodes
from drumline.session.prepare import prepare_data
from drumline.session.train_here import Render, Survive, train_here
from drumline_launchers.base import Command, Job
from drumline_launchers.site import SITE, Site
from drumline_launchers.slurm import roll_call, step_command


@dataclass
class Allocation:
    """The Slurm job that this process runs in; slow and unresponsive hosts are removed from `hosts`."""

    job: str
    hosts: list[str]


def supervise_in_slurm(folder: RunFolder) -> int:
    """Supervise the run inside a Slurm job, through srun on its nodes; return the exit code."""
    site = load_site(folder.path / SITE)
    allocation = _allocation()
    _register(folder)
    listed = ",".join(allocation.hosts)
    remark = _preflight(folder, site, allocation) if site.preflight else ""
    return _supervise(
        folder,
        allocation.hosts,
        f"in job {allocation.job} on {listed}{remark}",
        lambda p, n, until: _render(p, n, until, folder, site, allocation),
        lambda plan: _survive(plan, folder, allocation),
    )


def _register(folder: RunFolder) -> None:
    """Add this job to the record, if a person gave its script to sbatch: `cancel` and `status` look there."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    known = [entry["id"] for entry in folder.read_record().get("jobs") or []]
    if job not in known and os.environ["SLURM_JOB_ID"] not in known:
        folder.add_job({"target": "slurm", "id": job, "submitted": now(), "by": "sbatch"})


def supervise_members(folder: RunFolder, nodes: int) -> int:
    """Supervise the run without Slurm, as the first of `nodes` nodes; return the exit code."""
    members.begin(folder)
    exit_code = LaunchError.exit_code
    try:
        exit_code = _supervise(
            folder,
            [f"node {number}" for number in range(nodes)],
            f"on {nodes} nodes",
            lambda p, n, until: members.render_first(p, n, folder, until),
        )
    finally:
        members.end(folder, exit_code)
    return exit_code


def _preflight(folder: RunFolder, site: Site, allocation: Allocation) -> str:
    """Measure the hosts' links and drop slow hosts if `cluster.nodes` allows fewer.

    Returns text for the attempt's cause, empty if no host is slow.
    """
    recipe = load_recipe(str(folder.recipe_file))
    plan = make_plan(recipe, start=folder.start_facts())
    per_node = plan.mesh.ranks_per_node
    try:
        report = links_of(allocation.hosts, per_node, folder.path / "preflight.json", site)
    except LaunchError as error:  # not fatal: if the links are broken, training itself fails
        print(error, file=sys.stderr)
        return "; pre-flight failed"
    print(table(report), file=sys.stderr)
    slow = slow_nodes(report, site.slow_node_ratio)
    if not slow:
        return ""
    print(slow_words(slow, site.slow_node_ratio), file=sys.stderr)
    left = [host for host in allocation.hosts if host not in slow]
    if not _are_enough(left, recipe):
        return f"; slow: {', '.join(slow)}"
    allocation.hosts = left
    return f"; without {', '.join(slow)}, slow in the pre-flight"


def _survive(plan: Plan, folder: RunFolder, allocation: Allocation) -> tuple[Plan | None, str]:
    """Return the plan for the hosts that still answer, and text about those that do not.

    The plan is None if too few hosts are left; the job is then requeued, to get others from Slurm.
    """
    left = slurm.answering(allocation.hosts, roll_call(allocation.hosts))
    lost = [host for host in allocation.hosts if host not in left]
    if not lost:
        return plan, ""
    words = f"{', '.join(lost)} {'does' if len(lost) == 1 else 'do'} not answer"
    allocation.hosts = left
    smaller = None
    if _are_enough(left, load_recipe(str(folder.recipe_file))):
        with contextlib.suppress(PlanError):  # no number of these nodes divides the batch
            smaller = plan_for(folder, len(left))
    if smaller is None:
        return None, f"{words}; the job asks Slurm for others"
    if refused := slurm.keep_only(allocation.job, left):
        print(f"{', '.join(lost)} could not be released from the job: {refused}", file=sys.stderr)
    return smaller, f"{words}; goes on with {_some(smaller.batch.nodes, left)}"


def _are_enough(hosts: list[str], recipe: Recipe) -> bool:
    nodes = recipe.cluster.nodes
    return isinstance(nodes, NodeRange) and len(hosts) >= nodes.min


def _some(used: int, hosts: list[str]) -> str:
    """Say how many hosts train (the first `used`), and name those that idle."""
    words = f"{used} {'node' if used == 1 else 'nodes'}"
    idle = ", ".join(hosts[used:])
    return f"{words}; idle, because no split uses more: {idle}" if idle else words


def _supervise(
    folder: RunFolder,
    hosts: list[str],
    where: str,
    render: Render,
    survive: Survive = lambda plan: (plan, ""),
) -> int:
    """Plan for these hosts, train, report the end; return the exit code."""
    plan = plan_for(folder, len(hosts))
    prepare_data(plan.recipe)
    plan = make_plan(plan.recipe, start=plan.start, site=plan.site)
    _refuse_another_training(folder, plan)
    cause = f"{'resume' if folder.read_record()['attempts'] else 'start'} {where}"
    if len(hosts) > plan.batch.nodes:
        cause += f"; with {_some(plan.batch.nodes, hosts)}"
    print(cause, file=sys.stderr)
    result, seconds = train_here(folder, plan, cause, render=render, survive=survive)
    report_end(folder, plan, result, seconds)
    return result.exit_code


def plan_for(folder: RunFolder, nodes: int) -> Plan:
    """Plan the run's recipe on as many of `nodes` nodes as its batch can be split over."""
    file = folder.path / SITE
    site = facts_of(load_site(file)) if file.exists() else NO_SITE
    return plan_on_nodes(load_recipe(str(folder.recipe_file)), nodes, folder.start_facts(), site)


def _refuse_another_training(folder: RunFolder, plan: Plan) -> None:
    record = folder.read_record()
    for name, was, here in (
        ("training_sha256", record["training_sha256"], plan.training_sha256),
        ("data fingerprint", record["data"]["fingerprint"], plan.data.fingerprint),
    ):
        if was != here:
            raise RunFolderError(
                f"{folder.path}: {name} changed since the job was submitted: {was} then, {here} now"
            )


def _allocation() -> Allocation:
    environment = os.environ
    if not {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"} <= environment.keys():
        raise LaunchError(
            "attend without --nodes runs in a Slurm job only. Nearest: drumline submit, or drumline resume"
        )
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        hosts=slurm.host_names(environment["SLURM_JOB_NODELIST"]),
    )


def _render(
    plan: Plan,
    number: int,
    until: int | None,
    folder: RunFolder,
    site: Site,
    allocation: Allocation,
) -> Command:
    """Render the attempt's srun; the rendezvous is on the first host, at a port free on this host."""
    job = Job(
        plan_file=folder.plan_file(number),
        run_folder=folder.path,
        attempt=number,
        python=sys.executable,
        host=allocation.hosts[0],
        port=free_port(),
        until=until,
    )
    return step_command(plan, job, site, allocation.hosts)
