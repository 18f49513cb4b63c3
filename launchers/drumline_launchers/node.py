"""One node of several: srun starts this on each node, and it execs that node's launcher.

    python -m drumline_launchers.node --plan FILE --run-dir DIR --attempt N --host NODE-0 --port P

The node rank comes from SLURM_NODEID, JOB_COMPLETION_INDEX or NODE_RANK (default 0), the node's own address
from SLURMD_NODENAME, if it is set.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from drumline.plan.model import Plan, read_plan
from drumline_launchers import LAUNCHERS
from drumline_launchers.base import Command, Job
from drumline_launchers.environment import launch_environment

_NODE_NUMBER = ("SLURM_NODEID", "JOB_COMPLETION_INDEX", "NODE_RANK")


def node_number(environment: Mapping[str, str]) -> int:
    """Return this node's rank, counted from 0."""
    return int(next((environment[name] for name in _NODE_NUMBER if name in environment), "0"))


def node_command(
    plan: Plan, arguments: argparse.Namespace, environment: Mapping[str, str]
) -> Command:
    """Render this node's launcher."""
    job = Job(
        plan_file=arguments.plan,
        run_folder=arguments.run_dir,
        attempt=arguments.attempt,
        python=sys.executable,
        node_rank=node_number(environment),
        host=arguments.host,
        port=arguments.port,
        until=arguments.until,
        address=environment.get("SLURMD_NODENAME"),
    )
    return LAUNCHERS[plan.recipe.launch.launcher](plan, job)


def main() -> None:
    """Write the launcher's files, then exec the launcher."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--until", type=int)
    arguments = parser.parse_args()
    if not arguments.plan.is_file():
        sys.exit(
            f"{arguments.plan} is not visible on this node; the run folder must be on a shared file system"
        )
    plan = read_plan(arguments.plan.read_text(encoding="utf-8"))
    command = node_command(plan, arguments, os.environ)
    command.write_files()
    environment = launch_environment(os.environ, command.env)
    os.execvpe(command.argv[0], command.argv, environment)  # noqa: S606


if __name__ == "__main__":
    main()
