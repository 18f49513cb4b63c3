"""Compares what a job asks for with what Slurm says its partition, nodes and accounts allow.

Only what Slurm answers is compared: a command that fails or prints nothing is no reason to refuse.
"""

import os
import pwd
import re
from dataclasses import dataclass

from drumline.cluster import slurm
from drumline.cluster.site import limit_seconds
from drumline.errors import LaunchError
from drumline.plan.model import Plan
from drumline.units import format_bytes
from drumline_launchers.site import Site

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Node:
    """What one node has: cores, memory in bytes, GPUs by type ("" where Slurm names none)."""

    cores: int
    memory: int
    gpus: dict[str, int]


def check_limits(plan: Plan, site: Site, fewest: int) -> None:
    """Raise LaunchError if the job could never start: `fewest` nodes of the plan's size on this site.

    Checked: whether the partition exists, its time and nodes; cores, memory and GPUs of its nodes; account
    and QOS of this user.
    """
    partitions = slurm.partitions()
    if not partitions:
        return
    names = site.partition.split(",") if site.partition else _default(partitions)
    found = [partitions[name] for name in names if name in partitions]
    unknown = [name for name in names if name not in partitions]
    if unknown:
        raise LaunchError(
            f"partition: {unknown[0]}: Slurm has no such partition. Nearest: {', '.join(sorted(partitions))}"
        )
    if not found:
        return
    problems = [_problem(plan, site, fewest, fields) for fields in found]
    if all(problems):
        raise LaunchError(problems[0])
    _check_account(site)


def _default(partitions: dict[str, dict[str, str]]) -> list[str]:
    return [name for name, fields in partitions.items() if fields.get("Default") == "YES"]


def _problem(plan: Plan, site: Site, fewest: int, partition: dict[str, str]) -> str:
    """Why the job cannot start in this partition; "" if it can."""
    name = partition["PartitionName"]
    where = f"partition {name}"
    limit = limit_seconds(partition.get("MaxTime", "UNLIMITED"))
    asked = limit_seconds(site.time_limit) if site.time_limit else None
    if limit is not None and site.time_limit and (asked is None or asked > limit):
        return (
            f"time_limit: {site.time_limit} is over the {partition['MaxTime']} of {where}. Nearest: "
            f"time_limit: {partition['MaxTime']}; a job that reaches it saves and goes on by itself"
        )
    most = partition.get("MaxNodes", "UNLIMITED")
    total = partition.get("TotalNodes", "")
    for text, words in ((most, "allows"), (total, "has")):
        if text.isdigit() and 0 < int(text) < fewest:
            return (
                f"nodes: {fewest} are asked for, {where} {words} {text}. Nearest: fewer batch.gpus"
            )
    nodes = nodes_of(name)
    if not nodes:
        return ""
    fitting = [node for node in nodes if not _lack(plan, site, node)]
    if len(fitting) >= fewest:
        return ""
    lacks = [lack for node in nodes if (lack := _lack(plan, site, node))]
    return (
        f"{lacks[0]}; {len(fitting)} of {len(nodes)} nodes of {where} have what a node of the job needs, "
        f"{fewest} {'are' if fewest > 1 else 'is'} asked for. Nearest: sinfo -N -o '%N %c %m %G' lists them"
    )


def _lack(plan: Plan, site: Site, node: Node) -> str:
    """What a node lacks for this job, with both figures; "" if nothing."""
    if site.cpus_per_node and site.cpus_per_node > node.cores:
        return f"cpus_per_node: {site.cpus_per_node} of {node.cores} cores"
    memory = _bytes(site.memory_per_node)
    if memory > node.memory:
        return f"memory_per_node: {site.memory_per_node} of {format_bytes(node.memory)}"
    if plan.recipe.cluster.gpu == "cpu":
        return ""
    wanted = plan.mesh.ranks_per_node
    if site.gpu_type and node.gpus and site.gpu_type not in node.gpus:
        types = ", ".join(filter(None, node.gpus)) or "no named type"
        return f"gpu_type: {site.gpu_type}, the node has {types}"
    has = node.gpus.get(site.gpu_type, 0) if site.gpu_type else sum(node.gpus.values())
    return f"GPUs: {wanted} of {has}" if wanted > has else ""


def nodes_of(partition: str) -> list[Node]:
    """The nodes of a partition, as sinfo lists them; [] if it does not answer."""
    found = []
    for line in slurm.node_lines(partition):
        cores, memory, gres = ([*line.split("|"), "", ""])[:3]
        if not (cores.rstrip("+").isdigit() and memory.rstrip("+").isdigit()):
            continue
        gpus: dict[str, int] = {}
        for kind, count in re.findall(r"gpu:(?:([A-Za-z0-9_.-]+):)?(\d+)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        found.append(Node(int(cores.rstrip("+")), int(memory.rstrip("+")) << 20, gpus))
    return found


def _bytes(memory: str | None) -> int:
    if not memory:
        return 0
    unit = memory[-1] if memory[-1] in _UNITS else "M"
    return int(memory.rstrip("KMGT")) * _UNITS[unit]


def _check_account(site: Site) -> None:
    rows = slurm.associations(pwd.getpwuid(os.getuid()).pw_name)
    if not rows:
        return
    accounts = sorted({row[0] for row in rows})
    if site.account and site.account not in accounts:
        raise LaunchError(
            f"account: {site.account}: this user has {', '.join(accounts)}. Nearest: {accounts[0]}"
        )
    allowed = {
        qos for row in rows if site.account in (None, row[0]) for qos in row[1].split(",") if qos
    }
    if site.qos and allowed and site.qos not in allowed:
        raise LaunchError(
            f"qos: {site.qos}: account {site.account or 'of this user'} has {', '.join(sorted(allowed))}. "
            f"Nearest: {min(allowed)}"
        )
