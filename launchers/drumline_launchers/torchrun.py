"""torchrun; its own restarts stay off, because drumline's supervisor decides."""

from dataclasses import dataclass

from drumline.plan.model import Plan
from drumline_launchers.base import (
    WORKER_ENVIRONMENT,
    Command,
    Job,
    start_module,
    worker_arguments,
)

PATIENCE_S = 600
"""Nodes import torch from a shared disk at their own pace; by default the first ones give up after 60 s."""


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet, under which name, and which of them this is; `address` is its own."""

    host: str
    port: int
    name: str
    node_rank: int
    address: str | None


def render(plan: Plan, job: Job) -> Command:
    """One worker per rank of this node."""
    name = f"{job.run_folder.name}-{job.attempt}"
    place = Meeting(job.host, job.port, name, job.node_rank, job.address)
    start = meet(job.python, plan.batch.nodes, plan.mesh.ranks_per_node, place)
    return Command([*start, "-m", *worker_arguments(job)], WORKER_ENVIRONMENT)


def meet(python: str, nodes: int, ranks: int, place: Meeting) -> list[str]:
    """`python -m torch.distributed.run` with its options: `ranks` on each of `nodes`."""
    return [
        *start_module(python, "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--node-rank={place.node_rank}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.host}:{place.port}",
        f"--rdzv-id={place.name}",
        "--max-restarts=0",
        *_address(place),
    ]


def _address(place: Meeting) -> list[str]:
    """Which node hosts the meeting, said outright where names alone cannot tell."""
    conf = f"--rdzv-conf=join_timeout={PATIENCE_S},read_timeout={PATIENCE_S}"
    if place.address is None:
        return [conf]
    hosts = "true" if place.node_rank == 0 else "false"
    return [f"--local-addr={place.address}", f"{conf},is_host={hosts}"]
