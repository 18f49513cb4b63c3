"""torchrun; its own restarts stay off, because drumline's supervisor decides."""

from launchers.base import WORKER_ENVIRONMENT, Command, Job, per_node, worker_arguments
from toolkit.plan.model import Plan


def render(plan: Plan, job: Job) -> Command:
    """`python -m torch.distributed.run` with one worker per rank of this node."""
    argv = [
        job.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={plan.batch.nodes}",
        f"--node-rank={job.node_rank}",
        f"--nproc-per-node={per_node(plan)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={job.host}:{job.port}",
        f"--rdzv-id={job.run_folder.name}-{job.attempt}",
        "--max-restarts=0",
        *_place(job),
        "-m",
        *worker_arguments(job),
    ]
    return Command(argv, WORKER_ENVIRONMENT)


def _place(job: Job) -> list[str]:
    """Which node hosts the meeting, said outright where names alone cannot tell."""
    if job.address is None:
        return []
    hosts = "true" if job.node_rank == 0 else "false"
    return [f"--local-addr={job.address}", f"--rdzv-conf=is_host={hosts}"]
