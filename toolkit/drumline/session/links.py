"""Measures the nodes' links, for `drumline doctor --preflight` and `drumline submit --preflight`."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from drumline.cluster import slurm
from drumline.cluster.preflight import bandwidths, measure, slow_nodes, table
from drumline.errors import LaunchError
from drumline.processes import free_port
from drumline_launchers.measure import measure_command
from drumline_launchers.site import Site
from drumline_launchers.slurm import on_each, python_of

CPU_RANKS = 2


def doctor_preflight(gpus: int, ratio: float, as_json: bool) -> None:
    """Measure this machine, or all nodes of the Slurm job it runs in; LaunchError if a node is slow."""
    hosts = None
    if "SLURM_JOB_ID" in os.environ:
        hosts = slurm.host_names(os.environ["SLURM_JOB_NODELIST"])
    with tempfile.TemporaryDirectory(
        prefix="drumline-preflight-", dir=Path.cwd() if hosts else None
    ) as name:
        report = links_of(hosts, gpus or CPU_RANKS, Path(name) / "preflight.json", None)
    slow = slow_nodes(report, ratio)
    if as_json:
        print(json.dumps({**report, "ratio": ratio, "slow": slow}))
    else:
        print(table(report))
        print(f"for the site file: {bandwidths(report)}")
    if slow:
        raise LaunchError(slow_words(slow, ratio))


def links_of(hosts: list[str] | None, ranks: int, out: Path, site: Site | None) -> dict[str, Any]:
    """Measure the links of the job's hosts, or of this machine if `hosts` is None; return the report.

    `ranks`: processes per node. `out`: the report's file, on a file system that all nodes see.
    """
    python = python_of(site, sys.executable, out.parent) if site else [sys.executable]
    if hosts is None:
        return measure(measure_command(python, 1, ranks, "127.0.0.1", free_port(), out), out)
    each = measure_command(python, len(hosts), ranks, hosts[0], free_port(), out)
    return measure(on_each(hosts, each, site), out)


def slow_words(slow: dict[str, str], ratio: float) -> str:
    """Say which nodes are slow, by how much, and what to do."""
    told = "; ".join(f"{host}: {words}" for host, words in slow.items())
    return (
        f"pre-flight: below {ratio:g} of the others: {told}. "
        f"Nearest: leave them out, `exclude: [{', '.join(slow)}]` in the site file"
    )
