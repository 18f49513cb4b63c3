"""When a plan does not fit: changes that keep the effective batch, each one re-planned."""

import dataclasses
from typing import Any

from toolkit.plan.model import Advice, Plan
from toolkit.plan.resolve import World, resolve
from toolkit.recipe.schema import Recipe
from toolkit.units import divisors

_CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"loss": {"chunked": True}}, "logits are never all alive; little extra time"),
    (
        {"model": {"activation_checkpointing": "full"}},
        "activations are computed twice: about a third more time",
    ),
    ({"strategy": {"name": "fsdp"}}, "parameters and optimizer state are sharded over the GPUs"),
)


def with_advice(plan: Plan, world: World) -> Plan:
    """A plan that does not fit, with what makes it fit (or the largest saving of each kind)."""
    advice = []
    smaller = _smaller_per_device(plan, world)
    if smaller:
        advice.append(smaller)
    changes = [*_CHANGES]
    merged: dict[str, Any] = {}
    for change, why in changes:
        if not _is_new(plan.recipe, change):
            continue
        merged |= change
        for candidate, reason in ((change, why), (dict(merged), "all of the above together")):
            found = _replan(plan.recipe, candidate, reason, world)
            if found and all(found.change != item.change for item in advice):
                advice.append(found)
    advice += _more_gpus(plan, world)
    fitting = [item for item in advice if item.device_high <= (plan.memory.capacity or 0)]
    return dataclasses.replace(plan, advice=fitting or advice)


def _smaller_per_device(plan: Plan, world: World) -> Advice | None:
    """The largest smaller per_device that fits, else per_device 1."""
    split = plan.batch.split
    rest = split.per_device * split.accumulation
    best = None
    for b in [b for b in divisors(rest) if b < split.per_device]:
        change = {"batch": {"per_device": b, "accumulation": rest // b}}
        found = _replan(plan.recipe, change, "smaller micro-batches, more of them", world)
        if found and (best is None or found.device_high <= (plan.memory.capacity or 0)):
            best = found
    return best


def _more_gpus(plan: Plan, world: World) -> list[Advice]:
    """Where state is sharded: the smallest number of GPUs that fits, if there is one."""
    if plan.recipe.strategy.name == "ddp":
        return []
    split, per_node = plan.batch.split, plan.batch.gpus // plan.batch.nodes
    for factor in divisors(split.effective // split.gpus)[1:]:
        gpus = split.gpus * factor
        per_device = max(b for b in divisors(split.effective // gpus) if b <= split.per_device)
        accumulation = split.effective // gpus // per_device
        change: dict[str, Any] = {
            "batch": {"gpus": gpus, "per_device": per_device, "accumulation": accumulation},
            "cluster": {"nodes": gpus // per_node, "gpus_per_node": per_node},
        }
        found = _replan(plan.recipe, change, "more ranks hold smaller shards", world)
        if found and found.device_high <= (plan.memory.capacity or 0):
            return [found]
    return []


def _is_new(recipe: Recipe, change: dict[str, Any]) -> bool:
    if "strategy" in change:
        return recipe.launch.launcher != "deepspeed" and recipe.strategy.name == "ddp"
    if "loss" in change:
        return not recipe.loss.chunked and recipe.data.task != "classification"
    return recipe.model.activation_checkpointing == "none"


def _replan(recipe: Recipe, change: dict[str, Any], why: str, world: World) -> Advice | None:
    evaluation, b = recipe.evaluation, change.get("batch", {}).get("per_device")
    if evaluation and b and (evaluation.per_device or b) > b:
        change = {**change, "evaluation": {"per_device": b}}
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in change.items()
    }
    memory = resolve(recipe.model_copy(update=sections), world).memory
    return Advice(change, memory.device.high, why) if memory.device else None
