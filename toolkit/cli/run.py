"""`drumline run` and `drumline resume`."""

import json
import math
import os
import shlex
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers import LAUNCHERS, Command
from launchers.base import Job
from toolkit.cli.plan import AsJson, Gpus, Overrides, RecipeArgument, make_plan, prepare_data
from toolkit.cli.show import change_words, plan_table
from toolkit.cli.world import read_world
from toolkit.errors import DoesNotFit, LaunchError, RunFolderError
from toolkit.files import ForgivingOutput
from toolkit.plan.advise import with_advice
from toolkit.plan.model import Plan
from toolkit.plan.resplit import with_smaller_per_device
from toolkit.recipe.load import load_recipe, override
from toolkit.recipe.schema import Recipe
from toolkit.runs import folder as run_folder
from toolkit.runs.folder import RunFolder
from toolkit.runs.outcome import Result
from toolkit.runs.progress import Progress
from toolkit.runs.record import new_record
from toolkit.runs.supervise import Surroundings, run_attempts
from toolkit.units import format_bytes, format_duration

Node = tuple[int, str, int]
"""Node rank, and host and port where the nodes meet."""

Force = Annotated[bool, typer.Option("--force", help="Train although the plan does not fit.")]


def run_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="New or empty.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would start.")] = False,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", min=0, help="With --dry-run: which node.")
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", help="With --dry-run: HOST:PORT of node 0.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then train here through the recipe's launcher."""
    loaded = load_recipe(recipe, overrides)
    check_offered(loaded)
    if run_dir is not None:
        run_folder.check_new(run_dir)
    if dry_run or not _needs_data(loaded):
        plan = make_plan(loaded)
        _refuse_what_does_not_fit(plan, force, as_json)
        if dry_run:
            return _show_command(plan, run_dir, _this_node(node_rank, rendezvous), as_json)
    prepare_data(loaded)
    plan = make_plan(loaded)
    refuse_what_cannot_start(plan, force, as_json)
    sys.stderr = ForgivingOutput(sys.stderr.fileno())
    print(plan_table(plan), file=sys.stderr)
    folder = run_folder.create(plan.recipe, run_dir)
    folder.write_record(new_record(plan))
    _finish(folder, plan, "start", as_json)


def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Overrides = None,
    gpus: Gpus = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Go on from the newest sound checkpoint; another split or strategy, the same training."""
    folder = run_folder.open_run(run)
    record = folder.read_record()
    if record["outcome"] == "finished":
        raise RunFolderError(
            f"{run}: this run is finished; there is nothing to resume. "
            f"Nearest: `drumline run {run} key=value` starts another"
        )
    with folder.locked():
        recipe = override(folder.latest_plan().recipe, overrides)
        folder.forget_restarts()
    check_offered(recipe)
    prepare_data(recipe)
    plan = make_plan(recipe, gpus)
    if plan.training_sha256 != record["training_sha256"]:
        raise RunFolderError(
            f"{run}: {' '.join(overrides or [])} would make it another training. "
            "A resumed run may change the split, cluster, strategy and launcher only"
        )
    expected = record["data"]["fingerprint"]
    if plan.data.fingerprint != expected:
        raise RunFolderError(
            f"{run}: the data have changed: fingerprint {expected} when the run began, "
            f"{plan.data.fingerprint} now"
        )
    refuse_what_cannot_start(plan, force, as_json)
    sys.stderr = ForgivingOutput(sys.stderr.fileno())
    print(plan_table(plan), file=sys.stderr)
    _finish(folder, plan, "resume", as_json)


def check_offered(recipe: Recipe) -> None:
    """LaunchError for what this release or this machine lacks."""
    launcher = recipe.launch.launcher
    if launcher != "torchrun" and find_spec(launcher) is None:
        raise LaunchError(
            f"launch.launcher: {launcher} is not installed. "
            f"Nearest: pip install 'drumline[{launcher}]', or launch.launcher=torchrun"
        )
    if recipe.logging.wandb:
        raise LaunchError(
            "logging.wandb: this release has no W&B tracker yet. Nearest: logging.wandb=null; "
            "metrics.jsonl holds every step"
        )


def _needs_data(recipe: Recipe) -> bool:
    """Whether the number of steps is known only once the data are prepared."""
    counted = recipe.duration.steps is None or recipe.schedule.unit == "epoch"
    return counted and recipe.data.samples is None


def _show_command(plan: Plan, run_dir: Path | None, node: Node, as_json: bool) -> None:
    """What `--dry-run` prints: ready to paste, or as an object."""
    if plan.data.cache is None:
        print(
            "the data are not prepared, so this would not train yet: `drumline prepare` first, and "
            "print it again",
            file=sys.stderr,
        )
    folder = RunFolder((run_dir or Path("runs") / f"{plan.recipe.recipe}-N").absolute())
    command = _render(plan, folder, 0, node)
    if as_json:
        print(json.dumps(vars(command)))
        return
    where = {name: shlex.quote(str(path)) for name, path in (
        ("logs", folder.logs(0)), ("checkpoints", folder.checkpoints), ("plan", folder.plan_file(0)),
    )}  # fmt: skip
    print(f"mkdir -p {where['logs']} {where['checkpoints']}")
    print(f"printf %s {shlex.quote(plan.to_json())} > {where['plan']}")
    print(command.to_shell())


def refuse_what_cannot_start(plan: Plan, force: bool, as_json: bool) -> None:
    """Exit 2 where the plan wants several nodes, 3 where it does not fit in memory."""
    if plan.batch.nodes > 1 and plan.recipe.cluster.gpu != "cpu":
        per_node = plan.batch.gpus // plan.batch.nodes
        raise LaunchError(
            f"the plan wants {plan.batch.nodes} nodes, and `run` starts processes on one. "
            f"Nearest: batch.gpus={per_node} batch.accumulation=null; or --dry-run --node-rank N "
            "--rendezvous HOST:PORT, whose output starts one node of them"
        )
    _refuse_what_does_not_fit(plan, force, as_json)


def _refuse_what_does_not_fit(plan: Plan, force: bool, as_json: bool) -> None:
    memory = plan.memory
    if memory.fits is False and not force:
        assert memory.device and memory.capacity
        if as_json:
            print(json.dumps(_facts(None, 0, None, None, 0.0, "does not fit")))
        raise DoesNotFit(
            f"memory: {format_bytes(memory.device.high)} per rank at most > "
            f"{format_bytes(memory.capacity)} of {plan.recipe.cluster.gpu}. "
            "`drumline plan` lists what makes it fit; --force trains all the same"
        )


def _render(
    plan: Plan, folder: RunFolder, attempt: int, node: Node, task: str = "train"
) -> Command:
    where = folder.plan_file(attempt), folder.path, attempt, sys.executable
    return LAUNCHERS[plan.recipe.launch.launcher](plan, Job(*where, *node, task))


def render_alone(plan: Plan, folder: RunFolder, attempt: int, task: str = "train") -> Command:
    """What starts an attempt on this machine, at a port that nobody has."""
    return _render(plan, folder, attempt, _alone(), task)


def _this_node(node_rank: int | None, rendezvous: str | None) -> Node:
    """Node rank and meeting place: as stated, else from NODE_RANK, MASTER_ADDR, MASTER_PORT."""
    if node_rank is None:
        stated = os.environ.get("NODE_RANK", "0")
        if not stated.isdigit():
            raise LaunchError(f"NODE_RANK={stated!r} in the environment is not a number")
        node_rank = int(stated)
    if rendezvous is None:
        rendezvous = ":".join(
            [os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")]
        )
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise LaunchError(f"--rendezvous {rendezvous}: expected HOST:PORT, such as node-0:29500")
    return node_rank, host, int(port)


def _alone() -> Node:
    """One node, and a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return 0, "127.0.0.1", free.getsockname()[1]


def _finish(folder: RunFolder, plan: Plan, cause: str, as_json: bool) -> None:
    """Run the attempts, say how it ended, and leave with the right code."""
    print(f"\nrun folder {folder.path}", file=sys.stderr)
    started = time.monotonic()
    progress = Progress(plan.steps.total)
    around = Surroundings(
        render=lambda current, number: render_alone(current, folder, number),
        shrink=_smaller_plan,
        advice=_advice_words,
        tick=progress,
        say=progress.say,
    )
    try:
        with folder.locked():
            result = run_attempts(folder, plan, cause, around)
    finally:
        progress.close()
    seconds = time.monotonic() - started
    _report(folder, plan, result, seconds)
    if as_json:
        facts = _facts(
            folder.path, result.step, result.loss, result.evaluation, seconds, result.outcome
        )
        print(json.dumps(facts))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _smaller_plan(plan: Plan) -> Plan | None:
    """What runs after an attempt that ran out of memory."""
    smaller = with_smaller_per_device(plan.recipe, plan.batch.split)
    return make_plan(smaller) if smaller else None


def _advice_words(plan: Plan) -> str:
    """What could make a plan fit that ran out of memory at per_device 1."""
    changes = with_advice(plan, read_world(plan.recipe)).advice
    head = "batch.per_device is 1 already, so a smaller micro-batch is no way out. Nearest:"
    lines = [f"  {change_words(item.change)}   {item.why}" for item in changes]
    return "\n".join([head, *lines]) if lines else f"{head} a GPU with more memory"


def _facts(
    run: Path | None,
    steps: int,
    loss: float | None,
    evaluation: dict[str, float] | None,
    seconds: float,
    outcome: str,
) -> dict[str, Any]:
    """The object of `--json`; a number that is not finite is null."""
    return {
        "run": str(run) if run else None,
        "steps": steps,
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "eval": evaluation and {k: v if math.isfinite(v) else None for k, v in evaluation.items()},
        "seconds": round(seconds, 3),
        "outcome": outcome,
    }


def _report(folder: RunFolder, plan: Plan, result: Result, seconds: float) -> None:
    shown = shlex.quote(str(_shortest(folder.path)))
    words = f"{result.outcome} at step {result.step:,} after {format_duration(seconds)}"
    if result.loss is not None:
        words += f", loss {result.loss:.4f}"
    for name, value in (result.evaluation or {}).items():
        words += f", {name} {value:.4f}"
    print(f"\n{words}", file=sys.stderr)
    if result.message:
        print(result.message, file=sys.stderr)
    print(f"run   {shown} (metrics.jsonl has a line for every step)", file=sys.stderr)
    if result.outcome == "finished":
        batch = plan.batch
        gpus = 2 * batch.gpus if batch.effective % (2 * batch.gpus) == 0 else 1
        print(
            f"next  drumline plan {shown} --gpus {gpus}   {_promise(plan)}",
            file=sys.stderr,
        )
    else:
        print(f"next  drumline resume {shown}", file=sys.stderr)


def _promise(plan: Plan) -> str:
    if plan.split_invariance.level == "rounding":
        return "the same training, split otherwise"
    return "the same samples, split otherwise (see its split line)"


def _shortest(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("run")(run_command)
    app.command("resume")(resume_command)
