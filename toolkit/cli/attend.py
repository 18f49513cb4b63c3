"""`drumline attend RUN`: what a job's script starts on its first node; supervises the run from there.

At every start the plan is made anew for the nodes that the job got, at the same effective batch.
"""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launchers.base import Command, Job
from launchers.slurm import step_command
from toolkit.cli.plan import make_plan, prepare_data
from toolkit.cli.run import report_end
from toolkit.cli.submit import SITE
from toolkit.cli.train_here import train_here
from toolkit.errors import LaunchError, PlanError, RunFolderError
from toolkit.plan.model import Plan
from toolkit.recipe.load import load_recipe
from toolkit.runs.folder import RunFolder, open_run
from toolkit.site import Site, load_site


@dataclass(frozen=True)
class Allocation:
    """The job that this process runs in."""

    job: str
    nodes: int
    node_list: str
    host: str
    restarts: int


def attend_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Inside a Slurm job: start the run or go on with it, on the nodes that there are."""
    folder = open_run(run)
    if folder.read_record()["outcome"] == "finished":
        print(f"{run}: this run is finished")
        return
    place = load_site(folder.path / SITE)
    allocation = _allocation()
    plan, idle = plan_for(folder, allocation.nodes)
    prepare_data(plan.recipe)
    plan = make_plan(plan.recipe)
    _refuse_another_training(folder, plan)
    cause = "start" if not folder.read_record()["attempts"] else "resume"
    cause += f" in job {allocation.job} on {allocation.node_list}"
    if idle:
        cause += f"; {idle} of its {allocation.nodes} nodes idle, no split for more"
    print(cause, file=sys.stderr)
    result, seconds = train_here(
        folder, plan, cause, render=lambda p, n, until: _render(p, n, folder, place, allocation)
    )
    report_end(folder, plan, result, seconds)
    raise typer.Exit(result.exit_code)


def plan_for(folder: RunFolder, nodes: int) -> tuple[Plan, int]:
    """The run's recipe on the most of these nodes that the batch can be split over; how many are idle."""
    recipe = load_recipe(str(folder.recipe_file))
    as_submitted = make_plan(recipe)
    per_node = as_submitted.batch.gpus // as_submitted.batch.nodes
    for count in range(nodes, 0, -1):
        if as_submitted.batch.nodes == count:
            return as_submitted, nodes - count
        try:
            return make_plan(recipe, count * per_node), nodes - count
        except PlanError:
            continue
    raise PlanError(
        f"batch.effective {as_submitted.batch.effective} cannot be split over {per_node} GPUs of a node"
    )


def _refuse_another_training(folder: RunFolder, plan: Plan) -> None:
    record = folder.read_record()
    for name, was, now in (
        ("training_sha256", record["training_sha256"], plan.training_sha256),
        ("data fingerprint", record["data"]["fingerprint"], plan.data.fingerprint),
    ):
        if was != now:
            raise RunFolderError(
                f"{folder.path}: {name} was {was} when it was submitted, is {now} now"
            )


def _allocation() -> Allocation:
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        raise LaunchError(
            "attend is for inside a Slurm job. Nearest: drumline submit, or drumline resume"
        )
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
        node_list=environment.get("SLURM_JOB_NODELIST", ""),
        host=environment.get("SLURMD_NODENAME", socket.gethostname()),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def _render(
    plan: Plan, number: int, folder: RunFolder, site: Site, allocation: Allocation
) -> Command:
    """Srun of the attempt; the ranks meet on this node, at a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    where = folder.plan_file(number), folder.path, number, sys.executable
    return step_command(plan, Job(*where, host=allocation.host, port=port), site)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("attend", hidden=True)(attend_command)
