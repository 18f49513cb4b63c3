"""The job that a launcher is given, and the command that it renders; no shell is involved."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from drumline.files import write_text
from drumline.plan.model import Plan


@dataclass(frozen=True)
class Job:
    """One attempt on one node: the workers read `plan_file` and write below `run_folder`.

    `host` and `port`: the rendezvous of all nodes. `task`: what the workers run, as in their `--task`.
    `until`: the step to stop after. `address`: this node's own address, where other nodes do not reach it
    by its host name.
    """

    plan_file: Path
    run_folder: Path
    attempt: int
    python: str
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 29500
    task: str = "train"
    until: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Command:
    """Arguments for exec, environment variables on top of the caller's, and files to write first.

    `is_remote`: it starts processes on other hosts, and needs time to end them before it is killed.
    """

    argv: list[str]
    env: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    is_remote: bool = False

    def write_files(self) -> None:
        """Write the files; OSError as `write_durably`."""
        for path, text in self.files.items():
            write_text(Path(path), text)

    def to_shell(self) -> str:
        """Return the command as shell text, every value quoted."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        writes = [
            f"printf %s {shlex.quote(text)} > {shlex.quote(path)}"
            for path, text in sorted(self.files.items())
        ]
        return "\n".join([*writes, " ".join([*settings, shlex.join(self.argv)])])


WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the worker sets its own number of compute threads
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take CPU time from other processes
    "PYTHONSAFEPATH": "1",  # what `-P` does, for the ranks too, which launchers start without it
    "PYTHONUTF8": "1",  # paths and plans are UTF-8 whatever the node's locale
    "TOKENIZERS_PARALLELISM": "false",
}

LOOPBACK = "127.0.0.1"
_LOOPBACK_DEVICE = "lo"

Renderer = Callable[[Plan, Job], Command]


def meeting_point(plan: Plan, job: Job) -> Job:
    """Return the job with the rendezvous on the loopback address if all ranks are on one node.

    Then no name of the host, no route and no firewall matters.
    """
    return (
        replace(job, host=LOOPBACK, address=LOOPBACK, node_rank=0) if plan.batch.nodes == 1 else job
    )


def worker_environment(plan: Plan) -> dict[str, str]:
    """Return the variables that every launcher sets for the ranks."""
    if plan.batch.nodes > 1:
        return dict(WORKER_ENVIRONMENT)
    interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _LOOPBACK_DEVICE)
    return {**WORKER_ENVIRONMENT, **interfaces}


def start_module(python: str, module: str) -> list[str]:
    """Return `python -P -m module`; `-P` keeps the current folder off the import path."""
    return [python, "-P", "-m", module]


def worker_arguments(job: Job) -> list[str]:
    """Return the worker module and its arguments, which follow the launcher's own options."""
    return [
        "drumline.train.worker",
        "--plan",
        str(job.plan_file),
        "--run-dir",
        str(job.run_folder),
        "--attempt",
        str(job.attempt),
        *(["--task", job.task] if job.task != "train" else []),
        *(["--until", str(job.until)] if job.until else []),
    ]


def attend_command(run: str, nodes: int, configuration: str) -> list[str]:
    """Return the command of every node without srun: the first supervises the run, the others follow it."""
    start = start_module("python", "drumline.cli")
    return [*start, "attend", run, "--nodes", str(nodes), "--from", configuration]
