"""Reads the checkpoint of another run that a recipe begins from (`start_from`)."""

import shlex
from pathlib import Path
from typing import Any

from drumline.checkpoint.manifest import MANIFEST, digest_of, read_manifest, step_of, verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.checkpoint.shards import read_entries
from drumline.checkpoint.state import TrainState
from drumline.checkpoint.weights import WEIGHTS
from drumline.errors import CheckpointError, PlanError, RecipeError, RunFolderError
from drumline.files import read_json
from drumline.plan import schedule
from drumline.plan.start import Parent
from drumline.plan.steps import Clock, Place
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe, StartFrom
from drumline.runs.folder import open_run

_MOST_RANKS = 64
"""Of a checkpoint of more ranks, the names of the weights are compared when it is loaded, not in the plan."""


def read_parent(spec: StartFrom) -> Parent:
    """The checkpoint that `start_from` names; PlanError where there is none that a run could begin from."""
    path = find_checkpoint(spec)
    try:
        index, state = read_manifest(path), verify(path, ranks=[])
    except CheckpointError as error:
        raise PlanError(f"start_from: {error}") from None
    if not isinstance(index["recipe"], dict):
        raise PlanError(f"start_from.run: {path} does not hold its recipe. Nearest: a later one")
    try:
        recipe = validate(index["recipe"], str(path))
    except RecipeError as error:
        raise PlanError(f"start_from: {error}") from None
    run = path.parent.parent
    if not (run / "record.json").is_file():
        run = path  # a checkpoint by itself
    facts = _plan_facts(run)
    return Parent(
        run=str(run),
        checkpoint=str(path),
        sha256=digest_of(index),
        training_sha256=state.training_sha256,
        recipe=recipe,
        fingerprint=state.fingerprint,
        rows=state.rows,
        place=_place(state, recipe, facts, spec),
        weights=_weights(path, index["ranks"]),
        rate=_rate(facts, state.step),
    )


def find_checkpoint(spec: StartFrom) -> Path:
    """The folder of the checkpoint; PlanError names those that are there."""
    path = Path(spec.run)
    if (path / MANIFEST).is_file():
        step = _step_in(path)
        if spec.step not in (None, step):
            raise PlanError(
                f"start_from.step: {spec.step}, and {path} is of step {step}. Nearest: "
                f"start_from.run={shlex.quote(str(path.parent.parent))}"
            )
        return path.resolve()
    try:
        folder = open_run(path)
        found = find_checkpoints(folder.checkpoints)
    except (RunFolderError, CheckpointError) as error:
        raise PlanError(f"start_from.run: {error}") from None
    if not found:
        raise PlanError(
            f"start_from.run: {path} has no checkpoint yet. Nearest: a run that has saved"
        )
    if spec.step is None:
        return found[-1]
    steps = {step_of(one): one for one in found}
    if spec.step not in steps:
        known = ", ".join(f"{step:,}" for step in steps if step)
        nearest = min(
            (step for step in steps if step), key=lambda step: abs(step - (spec.step or 0))
        )
        raise PlanError(
            f"start_from.step: {path} has no checkpoint of step {spec.step:,}, but of {known}. Nearest: "
            f"start_from.step={nearest}; checkpoint.keep_every keeps more of them"
        )
    return steps[spec.step]


def _step_in(path: Path) -> int:
    """The step of a checkpoint, whose folder may have another name than in its run."""
    try:
        return int(read_manifest(path)["step"])
    except CheckpointError as error:
        raise PlanError(f"start_from: {error}") from None


def _plan_facts(run: Path) -> dict[str, Any]:
    """What that run's record holds of its plan; nothing where a checkpoint lies in no run folder."""
    try:
        return read_json(run / "record.json")["plan"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _place(state: TrainState, recipe: Recipe, facts: dict[str, Any], spec: StartFrom) -> Place:
    """The place in that run's order; of older checkpoints by the record, which has the number of samples."""
    if state.slot is not None or spec.what == "weights":
        own = state.samples if state.own_samples is None else state.own_samples
        return Place(state.step, state.slot or 0, state.samples, own)
    samples = (facts.get("steps") or {}).get("samples")
    if not samples:
        raise PlanError(
            f"start_from.what: state: {spec.run} does not tell where its data stood. Nearest: "
            "start_from.what=weights"
        )
    assert recipe.batch.effective
    return Clock(samples, recipe.batch.effective, recipe.batch.remainder).place(state.step)


def _weights(path: Path, ranks: int) -> dict[str, tuple[int, ...]] | None:
    if ranks > _MOST_RANKS:
        return None
    found = {}
    try:
        for rank in range(ranks):
            for name, entry in read_entries(path, rank).items():
                if name.startswith(WEIGHTS):
                    found[name.removeprefix(WEIGHTS)] = tuple(entry["shape"])
    except CheckpointError as error:
        raise PlanError(f"start_from: {error}") from None
    return found


def _rate(facts: dict[str, Any], step: int) -> float | None:
    """The learning rate at a step by the schedule of the record; None where a rate is held in an epoch."""
    try:
        curve = schedule.Curve(**facts["schedule"])
        return None if curve.unit == "epoch" else schedule.rate_at(curve, step)
    except (KeyError, TypeError, AssertionError):
        return None
