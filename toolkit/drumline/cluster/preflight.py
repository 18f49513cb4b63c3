"""Pre-flight: link bandwidths of every node, measured before a run, and nodes slower than the others."""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from drumline.errors import LaunchError
from drumline.processes import python_path

_LIMIT_S = 300.0
LINKS = {
    "within": "all-reduce within the node",
    "between": "all-reduce with a neighbour",
    "copy": "host-to-device copy",
}


def measure(command: list[str], out: Path) -> dict[str, Any]:
    """Run the command and return the report that it writes to `out`; LaunchError with its last lines."""
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": python_path(os.environ)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=_LIMIT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise LaunchError(f"pre-flight: not done after {_LIMIT_S:.0f} s") from None
        log.seek(0)
        words = [line for line in log.read().splitlines() if line.strip()][-3:]
    if done or not out.is_file():
        raise LaunchError("pre-flight: the links could not be measured: " + " | ".join(words))
    return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def slow_nodes(report: dict[str, Any], ratio: float) -> dict[str, str]:
    """Hosts with a bandwidth below `ratio` × the median of the other nodes, each with a description."""
    found: dict[str, list[str]] = {}
    for link, words in LINKS.items():
        figures = {node["host"]: node[link] for node in report["nodes"] if node[link] is not None}
        for host, figure in figures.items():
            others = [value for other, value in figures.items() if other != host]
            if others and figure < ratio * (usual := statistics.median(others)):
                found.setdefault(host, []).append(
                    f"{words} {figure:.3g} GB/s, the others' median is {usual:.3g}"
                )
    return {host: "; ".join(words) for host, words in found.items()}


def table(report: dict[str, Any]) -> str:
    """Format the report as text: one line per node, in GB/s."""
    wide = max(len(node["host"]) for node in report["nodes"])
    head = f"{'GB/s':<{wide}}  {'  '.join(LINKS.values())}"
    lines = [
        f"{node['host']:<{wide}}  "
        + "  ".join(_cell(node[link], len(words)) for link, words in LINKS.items())
        for node in report["nodes"]
    ]
    ranks = f"{report['ranks_per_node']} ranks on a node, {report['device']}, {report['bytes'] >> 20} MiB"
    return "\n".join([head, *lines, ranks])


def bandwidths(report: dict[str, Any]) -> str:
    """The line of a site file that has the medians of the report, in GB/s."""
    found = []
    for link in LINKS:
        figures = [node[link] for node in report["nodes"] if node[link] is not None]
        if figures:
            found.append(f"{link}: {statistics.median(figures):.3g}")
    return f"bandwidths: {{{', '.join(found)}}}"


def _cell(figure: float | None, width: int) -> str:
    return f"{'-' if figure is None else f'{figure:.3g}':>{width}}"
