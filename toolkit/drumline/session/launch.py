"""From a plan to the command that starts it on this machine: checks, rendering, `--dry-run`."""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drumline.errors import DoesNotFit, LaunchError, RecipeError
from drumline.plan.advise import with_torchrun
from drumline.plan.model import Plan
from drumline.processes import free_port
from drumline.recipe.schema import Recipe
from drumline.runs.folder import RunFolder
from drumline.runs.trackers import wanted
from drumline.secrets import Secrets
from drumline.session.devices import check_gpus
from drumline.session.show import run_facts
from drumline.session.world import model_config
from drumline.units import format_bytes
from drumline_launchers import LAUNCHERS, Command
from drumline_launchers.base import Job
from drumline_launchers.environment import cleared_names
from drumline_launchers.site import Site


@dataclass(frozen=True)
class Node:
    """This node's rank, and the host and port of the rendezvous."""

    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 29500


def check_offered(recipe: Recipe) -> None:
    """Raise LaunchError if the launcher, a tracker or what builds the model is not installed."""
    launcher = recipe.launch.launcher
    if launcher != "torchrun" and find_spec(launcher) is None:
        raise LaunchError(
            f"launch.launcher: {launcher} is not installed. "
            f"Nearest: pip install 'drumline[{launcher}]', or {with_torchrun(recipe)}"
        )
    if recipe.model.adapter and find_spec("peft") is None:
        raise LaunchError(
            "model.adapter: peft is not installed. Nearest: pip install 'drumline[adapters]'"
        )
    if _is_of_timm(recipe) and not (find_spec("timm") and find_spec("torchvision")):
        raise LaunchError(
            "model: it is one of timm, which is not installed whole. Nearest: pip install timm torchvision, "
            "of versions that go with torch"
        )
    for tracker in wanted(recipe):
        if find_spec(tracker) is None:
            raise LaunchError(
                f"logging.{tracker}: {tracker} is not installed. "
                f"Nearest: pip install 'drumline[{tracker}]'; metrics.jsonl holds every step in any case"
            )


def _is_of_timm(recipe: Recipe) -> bool:
    """Whether the model is built by timm, as the recipe or the files of the model say."""
    if recipe.model.architecture == "timm_wrapper":
        return True
    config = model_config(recipe.model, []) or {}
    return "pretrained_cfg" in config or config.get("model_type") == "timm_wrapper"


def refuse_secrets(held: Recipe | Site, secrets: Secrets) -> None:
    """Raise RecipeError if a field contains a secret: a secret variable's value, or text like a token."""
    kind = type(held).__name__.lower()
    for name, value in held.model_dump(by_alias=True).items():
        if secrets.hide_in(value) != value:
            raise RecipeError(
                f"{kind}: {name}: it holds a secret of this environment, and {kind}s are written into "
                "records. Nearest: read it from the environment where it is needed"
            )


def show_command(plan: Plan, run_dir: Path | None, node: Node, as_json: bool) -> None:
    """Print what `--dry-run` shows: shell commands to paste, or the command as JSON."""
    folder = RunFolder((run_dir or Path("runs") / f"{plan.recipe.recipe}-N").absolute())
    command = _render(plan, folder, 0, node)
    if as_json:
        print(json.dumps(vars(command)))
        return
    where = {name: shlex.quote(str(path)) for name, path in (
        ("logs", folder.logs(0)), ("checkpoints", folder.checkpoints), ("plan", folder.plan_file(0)),
    )}  # fmt: skip
    if cleared := cleared_names(os.environ):
        print(f"unset {' '.join(cleared)}")
    print(f"mkdir -p {where['logs']} {where['checkpoints']}")
    print(f"printf %s {shlex.quote(plan.to_json())} > {where['plan']}")
    print(command.to_shell())


def refuse_what_cannot_start(plan: Plan, force: bool, as_json: bool) -> None:
    """Raise DoesNotFit (exit 3) for too little memory, LaunchError (exit 2) for nodes or GPUs not here."""
    if plan.batch.nodes > 1 and plan.recipe.cluster.gpu != "cpu":
        per_node = plan.mesh.ranks_per_node
        also = "" if plan.recipe.cluster.nodes is None else " cluster.nodes=null"
        raise LaunchError(
            f"the plan wants {plan.batch.nodes} nodes, and `run` starts processes on one. "
            f"Nearest: batch.gpus={per_node} batch.accumulation=null{also}; or --dry-run --node-rank N "
            "--rendezvous HOST:PORT, whose output starts one node of them"
        )
    refuse_what_does_not_fit(plan, force, as_json)
    check_gpus(plan.recipe, plan.mesh.ranks_per_node)


def refuse_what_does_not_fit(plan: Plan, force: bool, as_json: bool) -> None:
    """Raise DoesNotFit (exit 3) if the plan does not fit, unless forced; `as_json` prints the JSON first."""
    memory = plan.memory
    if memory.fits is False and not force:
        assert memory.device and memory.capacity
        if as_json:
            print(json.dumps(run_facts(None, 0, None, None, 0.0, "does not fit")))
        raise DoesNotFit(
            f"memory: {format_bytes(memory.device.expected)} per rank expected > "
            f"{format_bytes(memory.capacity)} of {plan.recipe.cluster.gpu_name}. "
            "`drumline plan` lists what makes it fit; --force trains all the same"
        )


def _render(plan: Plan, folder: RunFolder, attempt: int, node: Node, **what: Any) -> Command:
    job = Job(
        plan_file=folder.plan_file(attempt),
        run_folder=folder.path,
        attempt=attempt,
        python=sys.executable,
        node_rank=node.rank,
        host=node.host,
        port=node.port,
        **what,
    )
    return LAUNCHERS[plan.recipe.launch.launcher](plan, job)


def render_alone(plan: Plan, folder: RunFolder, attempt: int, **what: Any) -> Command:
    """Render an attempt that runs on this machine only, at a free port; `what`: the Job's task, until."""
    return _render(plan, folder, attempt, _alone(), **what)


def this_node(plan: Plan, node_rank: int | None, rendezvous: str | None) -> Node:
    """Return node rank and rendezvous: the options, else NODE_RANK, MASTER_ADDR and MASTER_PORT."""
    who = "--node-rank"
    if node_rank is None:
        who, stated = "NODE_RANK in the environment", os.environ.get("NODE_RANK", "0")
        if plan.batch.nodes == 1:
            stated = "0"  # left over from another job: one node has no other rank
        if not stated.isdigit():
            raise LaunchError(f"NODE_RANK={stated!r} in the environment is not a number")
        node_rank = int(stated)
    if node_rank >= plan.batch.nodes:
        raise LaunchError(
            f"{who} {node_rank}: the plan has {plan.batch.nodes} nodes, counted from 0. Nearest: "
            f"--node-rank {plan.batch.nodes - 1}"
        )
    who = "--rendezvous"
    if rendezvous is None:
        if plan.batch.nodes == 1:
            return Node(node_rank)
        who = "MASTER_ADDR:MASTER_PORT in the environment:"
        rendezvous = ":".join(
            [os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")]
        )
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise LaunchError(f"{who} {rendezvous}: expected HOST:PORT, such as node-0:29500")
    return Node(node_rank, host, int(port))


def _alone() -> Node:
    """Return node rank 0 with a rendezvous on this machine, at a free port."""
    return Node(port=free_port())
