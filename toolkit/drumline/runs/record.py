"""record.json: recipe, plan, inputs, code, environment, and one entry per attempt.

It holds all that `drumline reproduce` needs, also later and on another machine.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drumline.plan.model import Plan
from drumline.runs.ancestry import read_ancestry
from drumline.runs.code import read_code
from drumline.runs.environment import read_environment
from drumline.runs.inputs import data_entry, model_fingerprint
from drumline.secrets import Secrets

RECORD_VERSION = 1

_PLAN_FACTS = ("split_invariance", "batch", "steps", "schedule", "memory", "cost", "start")


def new_record(
    plan: Plan, command: list[str], secrets: Secrets, parent: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Build the record of a run that is about to start.

    `command` is the command line; `parent` names the run that this one reproduces.
    """
    recipe, plain = plan.recipe, plan.to_dict()
    return {
        "record_version": RECORD_VERSION,
        "recipe": plain["recipe"],
        "recipe_sha256": plan.recipe_sha256,
        "training_sha256": plan.training_sha256,
        "plan": {name: plain[name] for name in _PLAN_FACTS},
        "data": data_entry(plan),
        "model": {"fingerprint": model_fingerprint(recipe.model)},
        "seeds": {"recipe": recipe.seed},
        "code": read_code(recipe, Path.cwd(), secrets),
        **read_environment(),
        "command": secrets.hide_arguments(command),
        "parent": parent,
        "ancestry": read_ancestry(plan.start),
        "created": now(),
        "attempts": [],
        "restarts": 0,
        "outcome": None,
        "weights": None,
    }


def attempt_entry(
    plan: Plan,
    cause: str,
    environment: dict[str, str] | None = None,
    cleared: Sequence[str] = (),
    changed: dict[str, list[Any]] | None = None,
) -> dict[str, Any]:
    """Build the entry of an attempt at its start; the launcher's command is added later as `command`.

    `environment`: variables that reach the ranks and that a library may read; `cleared`: names of those that
    were taken away. `changed`: what differs from the record (`runs/changes.py`).
    """
    split = {
        "per_device": plan.batch.per_device,
        "gpus": plan.batch.gpus,
        "accumulation": plan.batch.accumulation,
    }
    return {
        "cause": cause,
        "split": split,
        "launcher": plan.recipe.launch.launcher,
        "strategy": plan.recipe.strategy.name,
        "environment": environment or {},
        "cleared": list(cleared),
        "changed": changed or {},
        "started": now(),
        "ended": None,
        "outcome": None,
    }


def now() -> str:
    """Current UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
