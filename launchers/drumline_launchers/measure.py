"""Measures one node's links: srun or a shell starts this on each node, and it execs torchrun.

python -m drumline_launchers.measure --nodes N --ranks R --host NODE-0 --port P --out FILE
"""

import argparse
import os
import sys
from pathlib import Path

from drumline_launchers.base import WORKER_ENVIRONMENT
from drumline_launchers.environment import launch_environment
from drumline_launchers.node import node_number
from drumline_launchers.torchrun import Rendezvous, torchrun_command


def measure_command(
    python: list[str], nodes: int, ranks: int, host: str, port: int, out: Path
) -> list[str]:
    """Return the command that every node runs, the same on each; `python` starts Python there."""
    shape = ["--nodes", str(nodes), "--ranks", str(ranks), "--host", host, "--port", str(port)]
    return [*python, "-P", "-m", "drumline_launchers.measure", *shape, "--out", str(out)]


def main() -> None:
    """Exec torchrun, which runs `drumline.train.bandwidth`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    number = node_number(os.environ) if given.nodes > 1 else 0
    rendezvous = Rendezvous(
        given.host, given.port, f"measure-{given.port}", number, os.environ.get("SLURMD_NODENAME")
    )
    argv = [
        *torchrun_command(sys.executable, given.nodes, given.ranks, rendezvous),
        "-m",
        "drumline.train.bandwidth",
    ]
    argv += ["--out", str(given.out)]
    os.execvpe(argv[0], argv, launch_environment(os.environ, WORKER_ENVIRONMENT))  # noqa: S606


if __name__ == "__main__":
    main()
