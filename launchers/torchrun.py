"""torchrun on one node; its own restarts stay off, because drumline's supervisor decides."""

from launchers.base import WORKER_ENVIRONMENT, Command, Job, worker_arguments
from toolkit.plan.model import Plan


def render(plan: Plan, job: Job) -> Command:
    """`python -m torch.distributed.run` with one worker per rank."""
    argv = [
        job.python,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={plan.batch.gpus}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--max-restarts=0",
        "-m",
        "toolkit.train.worker",
        *worker_arguments(job),
    ]
    return Command(argv, WORKER_ENVIRONMENT)
