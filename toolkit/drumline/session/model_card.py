"""The README.md of an exported model: what was trained on what, and how to train it again."""

from collections.abc import Mapping, Sequence
from typing import Any

from drumline import __version__
from drumline.compare.hub_runs import RECIPE
from drumline.plan.model import Plan
from drumline.recipe import yaml12
from drumline.runs.environment import THAT_TRAIN


def model_card(
    name: str,
    plan: Plan,
    record: Mapping[str, Any],
    step: int,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown with a head of YAML, as the hub reads it; nothing is said that the record does not hold.

    `name`: of the repository. `step`: of the exported checkpoint. `evaluations`: lines of the metrics.
    """
    recipe = plan.recipe
    head: dict[str, Any] = {
        "library_name": "peft" if recipe.model.adapter else "transformers",
        "tags": ["drumline"],
    }
    if recipe.model.source == "hub":
        head["base_model"] = recipe.model.name
    if recipe.data.source == "hub":
        head["datasets"] = [recipe.data.name]
    b = plan.batch
    optimizer, decay = recipe.optimizer, f"weight decay {recipe.optimizer.weight_decay:g}"
    rows = {
        "effective batch": f"{b.effective:,} = {b.per_device:,} per device × {b.gpus} GPUs × "
        f"{b.accumulation} accumulation",
        "optimizer steps": f"{step:,} of {plan.steps.total:,}",
        "optimizer": f"{optimizer.name}, peak rate {optimizer.lr:g}, {decay}",
        "schedule": f"{plan.schedule.name}, warm-up {plan.schedule.warmup_steps:,} steps",
        "precision": recipe.precision,
        "strategy": f"{recipe.strategy.name} through {recipe.launch.launcher}",
        "task": recipe.data.task,
        "model": _model(plan),
        "data": _data(record, plan),
        "seed": str(recipe.seed),
        "trained on": _hardware(record),
        "versions": _versions(record),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    parts = [
        f"---\n{yaml12.dump(head)}---\n",
        f"# {name}\n",
        f"{recipe.description or recipe.recipe}\n",
        f"Trained with drumline {__version__}; the recipe is `{RECIPE}`.\n",
        f"| | |\n|---|---|\n{table}\n",
        _evaluated(evaluations),
        "## Train it again\n",
        f"```sh\ndrumline reproduce hub:{name}\n```\n",
        "It trains from the recipe, at another split if asked (`--gpus N`), and compares every recorded "
        "step. The data have to be at hand: their fingerprint is checked first.\n",
    ]
    return "\n".join(part for part in parts if part)


def _model(plan: Plan) -> str:
    model, parameters = plan.recipe.model, plan.cost.parameters
    what = model.name or model.architecture or model.factory or "a folder's"
    revision = f" at {model.revision}" if model.revision else ""
    size = f", {parameters:,} parameters" if parameters else ""
    kind = "random weights of " if model.source in ("config", "factory") else ""
    return f"{kind}{what}{revision}{size}"


def _data(record: Mapping[str, Any], plan: Plan) -> str:
    fingerprint = (record.get("data") or {}).get("fingerprint")
    name = plan.recipe.data.name or plan.recipe.data.source
    rows = f", {plan.steps.samples:,} rows" if plan.steps.samples else ""
    return f"{name}{rows}, fingerprint `{fingerprint}`"


def _versions(record: Mapping[str, Any]) -> str:
    """Of what takes part in a training; nothing else of the machine is told."""
    versions = record.get("versions") or {}
    return ", ".join(f"{name} {versions[name]}" for name in THAT_TRAIN if versions.get(name))


def _hardware(record: Mapping[str, Any]) -> str:
    hardware = record.get("hardware") or {}
    gpus = hardware.get("gpus")
    return f"{len(gpus)} × {gpus[0]['name']}" if gpus else str(hardware.get("cpu") or "")


def _evaluated(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    last = evaluations[-1]
    rows = "\n".join(
        f"| {key} | {value:.5g} |"
        for key, value in last.items()
        if key.startswith("eval/") and isinstance(value, float)
    )
    return f"## Evaluation after step {last['step']:,}\n\n| | |\n|---|---|\n{rows}\n"
