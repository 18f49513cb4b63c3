"""record.json: what ran, with which versions, on what, and one entry per attempt."""

import platform
import socket
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from toolkit import __version__
from toolkit.plan.model import Plan

RECORD_VERSION = 1
_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "numpy",
    "safetensors",
    "pydantic",
    "wandb",
)


def new_record(plan: Plan) -> dict[str, Any]:
    """The record of a run that is about to start."""
    return {
        "record_version": RECORD_VERSION,
        "recipe": plan.recipe.model_dump(by_alias=True),
        "recipe_sha256": plan.recipe_sha256,
        "training_sha256": plan.training_sha256,
        "data": {"fingerprint": plan.data.fingerprint, "samples": plan.steps.samples},
        "versions": _versions(),
        "hardware": {"host": socket.gethostname(), "platform": platform.platform()},
        "created": now(),
        "attempts": [],
        "restarts": 0,
        "outcome": None,
    }


def attempt_entry(plan: Plan, cause: str) -> dict[str, Any]:
    """The entry of an attempt at its start."""
    split = {
        "per_device": plan.batch.per_device,
        "gpus": plan.batch.gpus,
        "accumulation": plan.batch.accumulation,
    }
    return {"cause": cause, "split": split, "started": now(), "ended": None, "outcome": None}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"drumline": __version__, "python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
