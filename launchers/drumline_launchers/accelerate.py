"""`accelerate launch` with its own configuration file, so that the user's default one has no effect.

Configured for a CPU, accelerate starts one process whatever --num_processes is. So the configuration always
says GPU; the worker still uses the CPU if the plan says so.
"""

import json
from typing import Any

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
    """Render `python -m accelerate.commands.launch` for this node's ranks."""
    job = meeting_point(plan, job)
    # One file per node: it contains the node rank, and all nodes share the run folder.
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
    env = {**worker_environment(plan), "ACCELERATE_USE_CPU": str(_on_cpu(plan)).lower()}
    return Command(argv, env, {config_file: json.dumps(_config(plan, job), indent=2) + "\n"})


def _config(plan: Plan, job: Job) -> dict[str, Any]:
    several = plan.mesh.ranks > 1
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
