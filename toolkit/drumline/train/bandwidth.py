"""Measures the bandwidth of each node's links before a run.

Started by launchers/drumline_launchers/measure.py on every node. Needs no plan: it uses all ranks that were
started, with NCCL on GPUs and gloo on CPUs. Rank 0 writes one JSON object, in GB/s (10^9 bytes a second): for
each node the all-reduce within it, the better of its all-reduces with its two neighbours, and the copy from
pinned host memory to a device.
"""

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_WARM, _TIMED = 2, 7
_GPU_BYTES, _CPU_BYTES = 256 << 20, 4 << 20
_TIMEOUT = timedelta(seconds=120)


def neighbours(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint node pairs, which together form a ring of all nodes.

    A slow node slows both of its own pairs, but only one of the two pairs of each neighbour.
    """
    ring = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    odd = ring.pop() if len(ring) % 2 and nodes > 2 else None
    return [found for found in (ring[::2], ring[1::2], [odd] if odd else []) if found]


def bus_bandwidth(size: int, ranks: int, seconds: float) -> float:
    """Bus bandwidth of an all-reduce of `size` bytes in GB/s, as in nccl-tests: 2(n-1)/n · size / seconds."""
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def measure(device: torch.device) -> dict[str, Any]:
    """Measure all links; a collective that returns the whole report on every rank."""
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes, node = dist.get_world_size() // per_node, dist.get_rank() // per_node
    size = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES
    data = torch.zeros(size // 4, device=device)
    within = _within(data, nodes, node, per_node)
    between = _between(data, nodes, node, per_node)
    host = torch.empty(size // 4, pin_memory=device.type == "cuda")
    copy = size / _median_seconds(lambda: data.copy_(host), device) / 1e9
    mine = {
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "within": within,
        "between": between,
        "copy": copy,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {
        "unit": "GB/s",
        "bytes": size,
        "ranks_per_node": per_node,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "nodes": [_slowest(everyone[n * per_node : (n + 1) * per_node]) for n in range(nodes)],
    }


def _slowest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A node's bandwidths: those of its slowest rank."""
    links = {
        name: min((r[name] for r in ranks if r[name] is not None), default=None)
        for name in ("within", "between", "copy")
    }
    return {"host": ranks[0]["host"], **links}


def _within(data: torch.Tensor, nodes: int, node: int, per_node: int) -> float | None:
    """Bus bandwidth of an all-reduce within this node, all nodes at the same time; None for one rank."""
    if per_node == 1:
        return None
    groups = [dist.new_group(list(range(n * per_node, (n + 1) * per_node))) for n in range(nodes)]
    return _all_reduce(data, groups[node], per_node)


def _between(data: torch.Tensor, nodes: int, node: int, per_node: int) -> float | None:
    """The better bus bandwidth of this node's all-reduces with its neighbours; None for one node."""
    if nodes == 1:
        return None
    found = []
    for pairs in neighbours(nodes):
        groups = {
            pair: dist.new_group(
                [n * per_node + rank for n in sorted(pair) for rank in range(per_node)]
            )
            for pair in pairs
        }
        dist.barrier()
        for pair, group in groups.items():
            if node in pair:
                found.append(_all_reduce(data, group, 2 * per_node))
    return max(found)


def _all_reduce(data: torch.Tensor, group: Any, ranks: int) -> float:
    seconds = _median_seconds(lambda: dist.all_reduce(data, group=group), data.device)
    return bus_bandwidth(data.nbytes, ranks, seconds)


def _median_seconds(act: Callable[[], object], device: torch.device) -> float:
    """Median seconds of seven synchronised calls, after two that set up the links."""
    seconds = []
    for _ in range(_WARM + _TIMED):
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARM:])


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def main() -> None:
    """Run one rank of the measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = _device()
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        report = measure(device)
        if dist.get_rank() == 0:
            arguments.out.write_text(json.dumps(report), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
