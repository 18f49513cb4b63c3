"""`accelerate launch`, with a configuration of its own, so that a user's default one changes nothing.

On a CPU accelerate starts one process, whatever --num_processes says, unless it is told that these
are GPUs; the worker then takes the CPU, as the plan says.
"""

import json
from typing import Any

from drumline.plan.model import Plan
from drumline_launchers.base import WORKER_ENVIRONMENT, Command, Job, start_module, worker_arguments


def render(plan: Plan, job: Job) -> Command:
    """`python -m accelerate.commands.launch` of this node's ranks."""
    # Each node has its own, with its number in it, in a folder that all share.
    config_file = str(job.run_folder / f"accelerate-{job.attempt}-node-{job.node_rank}.json")
    argv = [
        *start_module(job.python, "accelerate.commands.launch"),
        "--config_file",
        config_file,
        "--dynamo_backend",
        "no",
        "--max_restarts",
        "0",
        "--module",
        *worker_arguments(job),
    ]
    env = {**WORKER_ENVIRONMENT, "ACCELERATE_USE_CPU": str(_on_cpu(plan)).lower()}
    return Command(argv, env, {config_file: json.dumps(_config(plan, job), indent=2) + "\n"})


def _config(plan: Plan, job: Job) -> dict[str, Any]:
    several = plan.batch.gpus > 1
    lowered = plan.recipe.precision in ("bf16", "fp16") and not _on_cpu(plan)
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if several else "NO",
        "num_processes": plan.batch.gpus,
        "num_machines": plan.batch.nodes,
        "machine_rank": job.node_rank,
        "main_process_ip": job.host,
        "main_process_port": job.port,
        "rdzv_backend": "static",
        "same_network": True,
        "mixed_precision": plan.recipe.precision if lowered else "no",
        "use_cpu": False,
        "main_training_function": "main",
        "debug": False,
    }


def _on_cpu(plan: Plan) -> bool:
    return plan.recipe.cluster.gpu == "cpu"
