"""`drumline doctor [RECIPE]`: what this machine can run."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Annotated

import typer

from launchers import LAUNCHERS
from toolkit.cli.plan import make_plan
from toolkit.errors import LaunchError
from toolkit.plan.model import Plan
from toolkit.recipe.load import load_recipe
from toolkit.units import format_bytes

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "wandb")


def doctor_command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Also: can it run this recipe?")
    ] = None,
) -> None:
    """What this machine has, and what of a recipe it can run."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"cores        {len(os.sched_getaffinity(0))}, memory {format_bytes(memory)}")
    print(f"gpus         {', '.join(_gpus()) or 'none'}")
    for name in _PACKAGES:
        print(f"{name:<12} {_version(name) or 'not installed'}")
    print(f"launchers    {', '.join(LAUNCHERS)}")
    if recipe:
        problems = _problems(make_plan(load_recipe(recipe)))
        if problems:
            raise LaunchError(f"{recipe} cannot run here: " + "; ".join(problems))
        print(f"{recipe} can run here")


def _problems(plan: Plan) -> list[str]:
    found = []
    gpu, per_node = plan.recipe.cluster.gpu, plan.batch.gpus // plan.batch.nodes
    here = len(_gpus())
    if gpu != "cpu" and here < per_node:
        found.append(f"it wants {per_node} × {gpu} on a node, this machine has {here} GPUs")
    if plan.batch.nodes > 1:
        found.append(f"it wants {plan.batch.nodes} nodes")
    if plan.recipe.launch.launcher not in LAUNCHERS:
        found.append(f"launcher {plan.recipe.launch.launcher} is not offered yet")
    if plan.memory.fits is False:
        found.append("it does not fit in memory")
    return found


def _gpus() -> list[str]:
    """Names of the GPUs that nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("doctor")(doctor_command)
