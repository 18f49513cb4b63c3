"""The runs that a run began from, one after the other, as its record keeps them."""

from pathlib import Path
from typing import Any

from drumline.files import read_json
from drumline.plan.model import StartFacts

_KEPT = ("recipe", "recipe_sha256", "training_sha256", "data", "model", "versions", "created")
"""What is kept of each, with which it can be trained again."""


def read_ancestry(start: StartFacts | None) -> list[dict[str, Any]]:
    """The runs before this one, the oldest first: facts of the record, `run`, and the `step` it was left at.

    Of a checkpoint that lies in no run folder there is nothing to keep but its place.
    """
    if start is None:
        return []
    record: dict[str, Any] = {}
    try:
        found = read_json(Path(start.run) / "record.json")
        record = found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        pass
    before = record.get("ancestry") or []
    kept = {key: record.get(key) for key in _KEPT}
    return [*before, {**kept, "run": start.run, "step": start.step, "what": start.what}]
