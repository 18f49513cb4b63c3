"""What every launcher renders: an argument list and the environment it adds; no shell anywhere."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolkit.plan.model import Plan


@dataclass(frozen=True)
class Job:
    """Where an attempt lies: the workers read `plan_file` and write below `run_folder`."""

    plan_file: Path
    run_folder: Path
    attempt: int
    python: str


@dataclass(frozen=True)
class Command:
    """Arguments for exec, and environment variables on top of the caller's."""

    argv: list[str]
    env: dict[str, str]

    def to_shell(self) -> str:
        """The same as one line that a shell can run; every value quoted."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*settings, shlex.join(self.argv)])


WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the worker sets its own number of compute threads
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the others of a shared machine
    "PYTHONSAFEPATH": "1",  # never import what happens to lie in the current folder
    "TOKENIZERS_PARALLELISM": "false",
}

Renderer = Callable[[Plan, Job], Command]


def worker_arguments(job: Job) -> list[str]:
    """What every launcher puts after its own options."""
    return [
        "--plan",
        str(job.plan_file),
        "--run-dir",
        str(job.run_folder),
        "--attempt",
        str(job.attempt),
    ]
