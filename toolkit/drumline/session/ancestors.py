"""Trains the runs again that a reproduced run began from, where their checkpoints are not there any more."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drumline.checkpoint.manifest import verify
from drumline.errors import CheckpointError, DataError, PlanError, RunError
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe
from drumline.runs import folder as run_folder
from drumline.runs.record import new_record
from drumline.secrets import Secrets
from drumline.session.ending import report_end
from drumline.session.prepare import prepare_data
from drumline.session.start import read_parent
from drumline.session.train_here import train_here

Adapt = Callable[[Recipe], Recipe]
"""Moves a recorded recipe to this machine, and refuses code that may not run here."""
MakePlan = Callable[[Recipe], Plan]


def with_parent_here(
    recipe: Recipe,
    ancestry: list[dict[str, Any]],
    adapt: Adapt,
    make: MakePlan,
    changed_data: bool = False,
) -> Recipe:
    """The recipe with a `start_from` that is there: as recorded, or trained again up to its step.

    `ancestry`: of the record, the oldest first. `changed_data`: go on although data have changed. RunError
    where the record does not hold the recipe of a run that is needed; DataError where its data have changed.
    """
    spec = recipe.start_from
    parent = ancestry[-1] if ancestry else {}
    was = (parent.get("data") or {}).get("fingerprint")
    if spec is None or _is_there(recipe, was):
        return recipe
    if not parent.get("recipe"):
        raise RunError(
            f"start_from.run: {spec.run} is not there, and the record does not hold its recipe. Nearest: put "
            "that run folder back"
        )
    step = spec.step or parent["step"]
    print(
        f"\n{spec.run}: no sound checkpoint of step {step:,}, on the same data, is here: it is trained "
        "again first",
        file=sys.stderr,
    )
    own = adapt(validate(parent["recipe"], parent["run"]))
    own = with_parent_here(own, ancestry[:-1], adapt, make, changed_data)
    prepare_data(own)
    plan = make(own)
    if was != plan.data.fingerprint and not changed_data:
        raise DataError(
            f"start_from.run: the data of {parent['run']} have changed: fingerprint {was} when it was "
            f"logged, {plan.data.fingerprint} here. Nearest: the old data"
        )
    folder = run_folder.create(plan.recipe, None)
    folder.write_recipe(plan.recipe.model_dump(by_alias=True))
    origin = {"run": parent["run"], "created": parent.get("created")}
    folder.write_record(new_record(plan, sys.argv, Secrets(os.environ), origin))
    until = step if step < plan.steps.total else None
    result, seconds = train_here(folder, plan, "reproduce", until)
    report_end(folder, plan, result, seconds)
    if result.step < step:
        raise RunError(f"{folder.path}: ended at step {result.step:,}, before step {step:,}")
    return recipe.model_copy(
        update={"start_from": spec.model_copy(update={"run": str(folder.path), "step": step})}
    )


def _is_there(recipe: Recipe, fingerprint: str | None) -> bool:
    """Whether the checkpoint is there and sound, of the training and of the data that it was of."""
    assert recipe.start_from
    try:
        found = read_parent(recipe.start_from)
        verify(Path(found.checkpoint))
    except (PlanError, CheckpointError):
        return False
    is_same = recipe.start_from.training_sha256 in (None, found.training_sha256)
    return is_same and fingerprint in (None, found.fingerprint)
