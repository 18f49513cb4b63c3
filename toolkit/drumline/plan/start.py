"""What a run takes over from another one whose checkpoint it begins from (`start_from`). Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.plan.model import StartFacts
from drumline.plan.optimizers import rule_of
from drumline.plan.steps import Place
from drumline.recipe.schema import Recipe

_JUMP = 1.5
"""A learning rate that changes by more than this factor from one step to the next is warned of."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint of another run, as it was read.

    `recipe`: that run's, resolved. `fingerprint`: of its data, `rows`: of those that are trained. `place`:
    after the checkpoint's step, in that run's order. `weights`: shapes of its weights by name, None where
    they were not read. `rate`: see StartFacts.
    """

    run: str
    checkpoint: str
    sha256: str
    training_sha256: str
    recipe: Recipe
    fingerprint: str | None
    place: Place
    rows: str | None = None
    weights: Mapping[str, tuple[int, ...]] | None = None
    rate: float | None = None


def start_facts(
    recipe: Recipe, parent: Parent, fingerprint: str | None, rows: str | None = None
) -> StartFacts:
    """What the plan says of `start_from`; PlanError where this run cannot begin from that checkpoint.

    `fingerprint`: of this run's prepared data, None if there are none yet; `rows`: of those that are trained.
    """
    spec = recipe.start_from
    assert spec
    if spec.training_sha256 not in (None, parent.training_sha256):
        raise PlanError(
            f"start_from.training_sha256: {spec.training_sha256} stated, and {parent.run} trained "
            f"{parent.training_sha256}. Nearest: start_from.training_sha256=null, for another training"
        )
    _check_adapters(recipe, parent)
    place, continues = Place(), False
    if spec.what == "state":
        _check_state(recipe, parent)
        continues = _same_order(recipe, parent, fingerprint, rows)
        theirs = parent.place
        place = theirs if continues else Place(theirs.step, 0, theirs.consumed)
    return StartFacts(
        run=parent.run,
        checkpoint=parent.checkpoint,
        sha256=parent.sha256,
        step=parent.place.step,
        what=spec.what,
        training_sha256=parent.training_sha256,
        place=place,
        continues_data=continues,
        rate=parent.rate if spec.what == "state" else None,
    )


def check_weights_of(recipe: Recipe, parent: Parent, shape: ModelShape) -> None:
    """PlanError where that run's weights are not those of this model, but for a classifier's head."""
    from drumline.architectures.weight_names import problem_with

    spec = recipe.start_from
    if spec is None or parent.weights is None or recipe.model.adapter is not None:
        return
    has_new_head = recipe.data.facts.has_labels and spec.what == "weights"
    found = problem_with(shape, parent.weights, has_new_head)
    held = sum(math.prod(sizes) for sizes in parent.weights.values())
    if not found and not has_new_head and held != shape.parameters:
        found = f"they are {held:,} numbers, and the model has {shape.parameters:,}"
    if found:
        raise PlanError(
            f"start_from.run: the weights of {parent.run} are not those of this model: {found}. Nearest: the "
            "model section of that run's recipe.yaml"
        )


def rate_warning(start: StartFacts, first_rate: float) -> list[str]:
    """Warn where the learning rate jumps between the last step of the other run and the first of this one."""
    if not start.rate or not first_rate:
        return []
    if max(first_rate / start.rate, start.rate / first_rate) <= _JUMP:
        return []
    return [
        f"start_from: the learning rate was {start.rate:g} at step {start.step:,} of {start.run} and is "
        f"{first_rate:g} at step {start.step + 1:,}"
    ]


def _check_adapters(recipe: Recipe, parent: Parent) -> None:
    """Checkpoints of a run with an adapter hold what it trained alone, which goes onto the same base only."""
    ours, theirs = recipe.model.adapter, parent.recipe.model.adapter
    if ours and not theirs:
        raise PlanError(
            f"start_from.run: {parent.run} trained the whole model, and this run an adapter on a frozen one. "
            "Nearest: `drumline export` that run, then model.source=folder and model.path, its folder"
        )
    if theirs and not ours:
        raise PlanError(
            f"start_from.run: {parent.run} holds an adapter alone, and this run trains no adapter. Nearest: "
            "`drumline export --merge` that run, then model.source=folder and model.path, its folder"
        )
    if not (ours and theirs):
        return
    mine, other = (adapter.model_dump(exclude={"dropout"}) for adapter in (ours, theirs))
    different = [key for key in mine if mine[key] != other[key]]
    if different:
        told = "; ".join(f"{key} {other[key]} there, {mine[key]} here" for key in different)
        raise PlanError(
            f"start_from.run: {parent.run} has another adapter: {told}. Nearest: the same model.adapter"
        )
    if recipe.model.source not in ("folder", "hub"):
        same = recipe.seed == parent.recipe.seed and not _model_differences(recipe, parent)
        if not same:
            raise PlanError(
                f"start_from.run: the weights under the adapter of {parent.run} are drawn from its model "
                f"section and its seed {parent.recipe.seed}, and this run has others. Nearest: "
                f"seed={parent.recipe.seed} and the same model section"
            )


def model_warnings(recipe: Recipe, parent: Parent) -> list[str]:
    """Warn where the same weights make another model."""
    found = _model_differences(recipe, parent)
    return (
        [f"start_from: the model is not that of {parent.run}: {'; '.join(found)}"] if found else []
    )


def _model_differences(recipe: Recipe, parent: Parent) -> list[str]:
    """What of the two model sections says what is computed, and differs."""
    ours, theirs = recipe.model, parent.recipe.model
    found = [
        f"model.{key} {getattr(theirs, key)} there, {getattr(ours, key)} here"
        for key in ("architecture", "factory", "edits", "quantization")
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if (ours.source, ours.architecture) == (theirs.source, theirs.architecture):
        found += [
            f"model.config.{key} {theirs.config.get(key)} there, {ours.config.get(key)} here"
            for key in sorted({*ours.config, *theirs.config})
            if theirs.config.get(key) != ours.config.get(key)
        ]
    return found


def _check_state(recipe: Recipe, parent: Parent) -> None:
    done = parent.place.step
    ours, theirs = recipe.optimizer.name, parent.recipe.optimizer.name
    if ours != theirs:
        raise PlanError(
            f"start_from.what: state: {parent.run} has the state of {theirs}, and this run has {ours}. "
            "Nearest: start_from.what=weights"
        )
    states = [rule_of(one).states(one.optimizer, 4) for one in (recipe, parent.recipe)]
    if states[0] != states[1]:
        raise PlanError(
            f"start_from.what: state: {parent.run} keeps another optimizer state ({ours} with other keys). "
            "Nearest: start_from.what=weights, or the same optimizer section"
        )
    total = recipe.duration.steps
    if total is not None and total <= done:
        raise PlanError(
            f"duration.steps: {total} ≤ step {done} of {parent.run}, whose steps are counted on. Nearest: "
            f"duration.steps={2 * done}"
        )


def _same_order(recipe: Recipe, parent: Parent, fingerprint: str | None, rows: str | None) -> bool:
    """Whether the samples of this run follow those of the other one in one and the same order.

    `rows`: fingerprint of the rows that are trained; older checkpoints have that of all data alone.
    """
    if parent.recipe.seed != recipe.seed or fingerprint is None:
        return False
    return rows == parent.rows if rows and parent.rows else fingerprint == parent.fingerprint
