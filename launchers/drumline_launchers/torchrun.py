"""torchrun, with its own restarts off: drumline's supervisor decides about restarts."""

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
"""Rendezvous timeouts: the default read_timeout, 60 s, is short for nodes on a shared, slow disk."""


@dataclass(frozen=True)
class Meeting:
    """A rendezvous: host, port and id (`name`), with this node's rank and its own `address`."""

    host: str
    port: int
    name: str
    node_rank: int
    address: str | None


def render(plan: Plan, job: Job) -> Command:
    """Render `python -m torch.distributed.run` for this node's ranks."""
    name = f"{job.run_folder.name}-{job.attempt}"
    place = Meeting(job.host, job.port, name, job.node_rank, job.address)
    start = meet(job.python, plan.batch.nodes, plan.mesh.ranks_per_node, place)
    return Command([*start, "-m", *worker_arguments(job)], WORKER_ENVIRONMENT)


def meet(python: str, nodes: int, ranks: int, place: Meeting) -> list[str]:
    """Return `python -m torch.distributed.run` with its options: `nodes` nodes, `ranks` processes on each."""
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
    """Return rendezvous options; with an own address, `is_host` says whether this node hosts the store."""
    conf = f"--rdzv-conf=join_timeout={PATIENCE_S},read_timeout={PATIENCE_S}"
    if place.address is None:
        return [conf]
    hosts = "true" if place.node_rank == 0 else "false"
    return [f"--local-addr={place.address}", f"{conf},is_host={hosts}"]
