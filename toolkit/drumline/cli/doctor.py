"""`drumline doctor [RECIPE|RUN]`: what this machine can run, what state a run is in."""

import json
import os
import platform
import shutil
import subprocess
import textwrap
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from drumline.cli.options import AsJson
from drumline.errors import LaunchError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.runs.health import examine
from drumline.session.links import doctor_preflight
from drumline.session.planning import make_plan
from drumline.units import format_bytes
from drumline_launchers import LAUNCHERS
from drumline_launchers.site import SLOW_NODE_RATIO

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "wandb")


def doctor_command(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE|RUN]", help="Can it run here? What state is it in?"),
    ] = None,
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight", help="Measure the links of this machine, or of a Slurm job's nodes."
        ),
    ] = False,
    ratio: Annotated[
        float,
        typer.Option(
            "--ratio",
            min=0.01,
            max=0.99,
            help="A node below this share of the others' median is slow.",
        ),
    ] = SLOW_NODE_RATIO,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, whether it can run a recipe, or what state a run folder is in.

    Example: drumline doctor tiny-code-lm
    """
    if preflight:
        return doctor_preflight(len(_gpus()), ratio, as_json)
    if what and _is_run(Path(what)):
        return _tell_run(Path(what), as_json)
    plan = make_plan(load_recipe(what)) if what else None
    problems = _problems(plan) if plan else []
    facts = _machine()
    if as_json:
        print(json.dumps({**facts, "recipe": what, "problems": problems}))
    else:
        for name, value in facts.items():
            print(f"{name:<12} {value}")
    if problems:
        raise LaunchError(f"{what} cannot run here: " + "; ".join(problems))
    if what and not as_json:
        print(f"{what} can run here")


def _is_run(path: Path) -> bool:
    """Whether this is a run folder, even one without a record.json."""
    return path.is_dir() and any((path / n).exists() for n in ("record.json", "checkpoints"))


def _tell_run(path: Path, as_json: bool) -> None:
    health = examine(path)
    if as_json:
        print(json.dumps(asdict(health)))
        return
    print(f"run          {health.run}: {health.state}, {health.step:,} steps in metrics.jsonl")
    for attempt in health.attempts:
        split = " × ".join(str(n) for n in attempt["split"].values())
        ended = attempt["outcome"] or "not ended"
        print(f"attempt {attempt['number']:<4} {split}: {attempt['cause']}; {ended}")
        if seconds := attempt.get("start_s"):
            parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            print(f"             {sum(seconds.values()):.1f} s to the first step: {parts}")
    if health.state == "failed":
        print(textwrap.indent(health.message, "             "))
    print(f"sound        {', '.join(health.sound) or 'no checkpoint'}")
    for name in health.leftovers:
        print(f"left over    {name}")
    for warning in health.warnings:
        print(f"warning      {warning}")
    print(f"next         {health.next}")


def _machine() -> dict[str, str]:
    """Return facts about this machine by name: Python, cores, memory, GPUs, packages, launchers."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cores": f"{len(os.sched_getaffinity(0))}, memory {format_bytes(memory)}",
        "gpus": ", ".join(_gpus()) or "none",
        **{name: _version(name) or "not installed" for name in _PACKAGES},
        "launchers": ", ".join(LAUNCHERS),
    }


def _problems(plan: Plan) -> list[str]:
    found = []
    gpu, per_node = plan.recipe.cluster.gpu_name, plan.mesh.ranks_per_node
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
