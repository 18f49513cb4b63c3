"""DeepSpeed's per-node launcher; the `deepspeed` command itself leaves ranks running when it is killed."""

import base64
import json

from drumline.plan.deepspeed import deepspeed_config
from drumline.plan.model import Plan
from drumline_launchers.base import (
    Command,
    Job,
    meeting_point,
    start_module,
    worker_arguments,
    worker_environment,
)


def render(plan: Plan, job: Job) -> Command:
    """Render `python -m deepspeed.launcher.launch` for this node's ranks.

    The configuration file is for reference only; the workers build the same configuration from the plan. The
    first node alone writes it: the run folder may be on a file system that all nodes share.
    """
    job = meeting_point(plan, job)
    slots = list(range(plan.mesh.ranks_per_node))
    world = {f"node-{number}": slots for number in range(plan.batch.nodes)}
    argv = [
        *start_module(job.python, "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={job.node_rank}",
        f"--master_addr={job.host}",
        f"--master_port={job.port}",
        "--no_local_rank",
        "--module",
        *worker_arguments(job),
    ]
    kind = "cpu" if plan.recipe.cluster.gpu == "cpu" else "cuda"
    config_file = str(job.run_folder / f"deepspeed-{job.attempt}.json")
    text = json.dumps(deepspeed_config(plan), indent=2) + "\n"
    files = {config_file: text} if job.node_rank == 0 else {}
    return Command(argv, {**worker_environment(plan), "DS_ACCELERATOR": kind}, files)
