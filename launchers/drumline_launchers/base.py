"""What every launcher renders: arguments, environment and files; no shell anywhere."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from drumline.plan.model import Plan


@dataclass(frozen=True)
class Job:
    """Where an attempt lies: the workers read `plan_file` and write below `run_folder`.

    `node_rank` is this node's number; `host` and `port` are where the ranks of all nodes meet; `task`
    is what the workers do there, by a name that the worker knows; `until` the step to stop after;
    `address` this node's own, where its name is not the one that it is reached by.
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

    `is_remote`: it starts processes on other hosts, and must be let go to end them.
    """

    argv: list[str]
    env: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    is_remote: bool = False

    def to_shell(self) -> str:
        """The same as text that a shell can run; every value quoted."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        writes = [
            f"printf %s {shlex.quote(text)} > {shlex.quote(path)}"
            for path, text in sorted(self.files.items())
        ]
        return "\n".join([*writes, " ".join([*settings, shlex.join(self.argv)])])


WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the worker sets its own number of compute threads
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the others of a shared machine
    "PYTHONSAFEPATH": "1",  # `-P` for the ranks, which the launchers start
    "TOKENIZERS_PARALLELISM": "false",
}

Renderer = Callable[[Plan, Job], Command]


def start_module(python: str, module: str) -> list[str]:
    """`python -P -m module`: with a safe path, so that nothing in the current folder can be imported."""
    return [python, "-P", "-m", module]


def worker_arguments(job: Job) -> list[str]:
    """What every launcher puts after its own options."""
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
    """What every node of a cluster without srun starts: the first supervises, the others follow."""
    start = start_module("python", "drumline.cli")
    return [*start, "attend", run, "--nodes", str(nodes), "--from", configuration]
