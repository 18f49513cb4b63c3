"""torchrun, with its own restarts off: drumline's supervisor decides about restarts."""

import re
from dataclasses import dataclass

from drumline.plan.model import Plan
from drumline_launchers.base import (
    Command,
    Job,
    meeting_point,
    start_module,
    worker_arguments,
    worker_environment,
)

JOIN_TIMEOUT_S = 600
"""Rendezvous timeouts: the default read_timeout, 60 s, is short for nodes on a shared, slow disk."""


@dataclass(frozen=True)
class Rendezvous:
    """A rendezvous: host, port and id (`name`), with this node's rank and its own `address`."""

    host: str
    port: int
    name: str
    node_rank: int
    address: str | None


def render(plan: Plan, job: Job) -> Command:
    """Render `python -m torch.distributed.run` for this node's ranks."""
    job = meeting_point(plan, job)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{job.run_folder.name}-{job.attempt}")
    rendezvous = Rendezvous(job.host, job.port, name, job.node_rank, job.address)
    start = torchrun_command(job.python, plan.batch.nodes, plan.mesh.ranks_per_node, rendezvous)
    return Command([*start, "-m", *worker_arguments(job)], worker_environment(plan))


def torchrun_command(python: str, nodes: int, ranks: int, rendezvous: Rendezvous) -> list[str]:
    """Return `python -m torch.distributed.run` with its options: `nodes` nodes, `ranks` processes on each."""
    return [
        *start_module(python, "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--node-rank={rendezvous.node_rank}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous.host}:{rendezvous.port}",
        f"--rdzv-id={rendezvous.name}",
        "--max-restarts=0",
        *_address(rendezvous),
    ]


def _address(rendezvous: Rendezvous) -> list[str]:
    """Return rendezvous options; with an own address, `is_host` says whether this node hosts the store."""
    conf = f"--rdzv-conf=join_timeout={JOIN_TIMEOUT_S},read_timeout={JOIN_TIMEOUT_S}"
    if rendezvous.address is None:
        return [conf]
    hosts = "true" if rendezvous.node_rank == 0 else "false"
    return [f"--local-addr={rendezvous.address}", f"{conf},is_host={hosts}"]
