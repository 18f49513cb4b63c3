"""`drumline verify`: compares a split's gradient with the undivided batch's; exit 5 if they differ."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.cli.options import AsJson, Gpus, Overrides, RecipeArgument, TrustCode
from drumline.errors import NOT_EQUAL_EXIT_CODE, PlanError, RunError
from drumline.plan.model import Plan
from drumline.recipe.load import override
from drumline.runs import folder as run_folder
from drumline.runs.record import attempt_entry, new_record
from drumline.secrets import Secrets
from drumline.session.launch import check_offered, refuse_what_cannot_start, render_alone
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.session.trust import load_to_run
from drumline.supervise.attempt import run_attempt
from drumline.supervise.signals import Signals


def verify_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Gpus = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Only the first N layers.")
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="One gradient per sample; SHA-256 of the weights.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Check on the real model and data that this split's gradient equals that of the undivided batch.

    Example: drumline verify tiny-code-lm --layers 1
    """
    loaded = load_to_run(recipe, overrides, trust_code)
    if layers is not None:
        if loaded.model.source == "factory":
            raise PlanError(
                "--layers: a factory's model has no known layers. Nearest: leave it out"
            )
        loaded = override(loaded, [f"model.config.num_hidden_layers={layers}"])
    check_offered(loaded)
    prepare_data(loaded)
    plan = make_plan(loaded, gpus)
    refuse_what_cannot_start(plan, force=False, as_json=False)
    found = _bitwise(plan) if bitwise else _gradient(plan)
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(_words(found)))
    if not found["equal"]:
        raise typer.Exit(NOT_EQUAL_EXIT_CODE)


def _gradient(plan: Plan) -> dict[str, Any]:
    """Compare gradients and learning rates in the ranks; return their report with the verdict."""
    report = _in_ranks(plan, "verify")
    tolerance = report["tolerance"]
    wrong = [s for s in report["steps"] if not s["relative_error"] <= tolerance]
    own = report["own_loss"]
    is_own = own is None or own["relative_error"] <= tolerance
    wrong_rates = [r for r in report["rates"] if any(t != r["wanted"] for t in r["taken"])]
    return {
        "split": str(plan.batch.split),
        "launcher": plan.recipe.launch.launcher,
        "strategy": plan.recipe.strategy.name,
        "precision": plan.recipe.precision,
        **report,
        "equal": not wrong and not wrong_rates and is_own,
        "wrong_rates": wrong_rates,
    }


def _bitwise(plan: Plan) -> dict[str, Any]:
    """Compare weights after a few steps with one gradient per sample: of this split, and of one process."""
    alone = override(
        plan.recipe,
        [f"batch={{effective: {plan.batch.effective}, per_device: 1, gpus: 1, accumulation: null}}",
         "cluster.nodes=null", "cluster.gpus_per_node=null", "launch.launcher=torchrun",
         "strategy={name: ddp, shard: all, offload: none}"],
    )  # fmt: skip
    split = override(
        plan.recipe,
        ["launch.launcher=torchrun", "strategy={name: ddp, shard: all, offload: none}"],
    )
    found = {}
    for recipe in (split, alone):
        one = make_plan(recipe)
        found[str(one.batch.split)] = _in_ranks(one, "verify-bitwise")
    digests = {name: report["sha256"] for name, report in found.items()}
    steps = next(iter(found.values()))["steps"]
    return {"steps": steps, "sha256": digests, "equal": len(set(digests.values())) == 1}


def _in_ranks(plan: Plan, task: str) -> dict[str, Any]:
    """Run a worker task in the recipe's ranks, in a temporary run folder; return its report."""
    with tempfile.TemporaryDirectory(prefix="drumline-verify-") as name:
        folder = run_folder.create(plan.recipe, Path(name))
        folder.write_record(new_record(plan, sys.argv, Secrets(os.environ)))
        number = folder.add_attempt(plan, attempt_entry(plan, task))
        command = render_alone(plan, folder, number, task=task)
        print(f"{task}: {plan.batch.split}, {plan.recipe.launch.launcher}", file=sys.stderr)
        with Signals() as signals:
            result = run_attempt(folder, plan, number, command, _quiet, _quiet, signals)
        if result.kind != "finished":
            raise RunError(f"{task}: {result.message}")
        return json.loads((folder.path / "verify.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _quiet(told: object) -> None:
    """Do nothing: progress and messages of these ranks are not shown."""


def _words(found: dict[str, Any]) -> list[str]:
    """Format the verdict as lines of text."""
    verdict = "equal" if found["equal"] else "NOT EQUAL"
    if "sha256" in found:
        rows = [f"{digest}  {name}" for name, digest in found["sha256"].items()]
        return [
            *rows,
            f"{verdict}: weights after {found['steps']} steps of one gradient per sample",
        ]
    lines = [f"{found['split']}, {found['launcher']}, {found['strategy']}, {found['precision']}"]
    for step in found["steps"]:
        lines.append(
            f"step {step['step']:,}, {step['samples']} samples: relative error of the gradient "
            f"{step['relative_error']:.2g} (tolerance {found['tolerance']:g}); worst "
            f"{step['worst_parameter']} {step['worst_relative_error']:.2g}"
        )
    own = found["own_loss"]
    if own:
        lines.append(
            f"loss of a row {own['ours']:.6g}, by the model's own code {own['theirs']:.6g}: relative error "
            f"{own['relative_error']:.2g} (tolerance {found['tolerance']:g})"
        )
    for rate in found["wrong_rates"]:
        lines.append(
            f"step {rate['step']}: rate {rate['taken']}, the schedule says {rate['wanted']}"
        )
    if found["why_not_additive"]:
        lines.append(f"the objective says why: {found['why_not_additive']}")
    return [*lines, f"{verdict} to the undivided batch, one row at a time, summed in fp64"]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("verify")(verify_command)
