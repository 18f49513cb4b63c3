"""Facts that a finished run adds to its recipe.yaml, so that this file alone suffices to reproduce it.

They are comment lines after the recipe, one JSON object each: facts of the record, and a few step lines.
"""

import json
from collections.abc import Iterable
from typing import Any

from drumline.files import parse_json
from drumline.metrics_file import parsed_line
from drumline.runs.environment import THAT_TRAIN

_COMMENT = "#| "
_HEAD = "# What came out of this recipe, one fact a line, for `drumline reproduce`:"
_FACTS = (
    "recipe_sha256",
    "training_sha256",
    "data",
    "model",
    "code",
    "versions",
    "drumline_sha256",
    "hardware",
    "container",
    "created",
    "weights",
    "ancestry",
)
_STEP_FACTS = ("step", "digest", "lr", "loss", "grad_norm", "weight")
_FIRST_STEPS = 3
_MOST_STEPS = 64


def facts_comment(record: dict[str, Any], steps: Iterable[dict[str, Any]], last_step: int) -> str:
    """Format facts of the record, the first three step lines, and at most 64 more, evenly spaced.

    `steps` is consumed as a stream, so it may be of any length.
    """
    facts = {name: record.get(name) for name in _FACTS}
    versions = record.get("versions") or {}
    facts["versions"] = {name: versions.get(name) for name in THAT_TRAIN}
    code = {name: value for name, value in (record.get("code") or {}).items() if name != "left_out"}
    facts["code"] = {**code, "diff": "", "untracked": {}}
    every = -(-last_step // _MOST_STEPS) or 1
    lines = [_COMMENT + json.dumps({name: value}) for name, value in facts.items()]
    lines += [
        _COMMENT + json.dumps({"line": [line[name] for name in _STEP_FACTS]})
        for line in steps
        if line["step"] <= _FIRST_STEPS or line["step"] % every == 0
    ]
    return "\n".join(["", _HEAD, *lines, ""])


def read_facts(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the record's facts and the step lines from a recipe.yaml's comments; ValueError if damaged.

    Both are empty if the file has none.
    """
    record: dict[str, Any] = {}
    steps = []
    for row in text.split("\n"):
        if not row.startswith(_COMMENT):
            continue
        fact = parse_json(row.removeprefix(_COMMENT))
        if not isinstance(fact, dict):
            raise ValueError(f"a comment holds {type(fact).__name__}, not facts")
        if "line" in fact:
            steps.append(_step_line(fact["line"]))
        else:
            record |= fact
    return record, steps


def _step_line(values: Any) -> dict[str, Any]:
    """A step line of the comments; ValueError if it is none."""
    if not isinstance(values, list):
        raise ValueError("a line of a comment is not a list")
    line = parsed_line(json.dumps(dict(zip(_STEP_FACTS, values, strict=True))).encode())
    if line is None:
        raise ValueError(f"{values}: is not a step")
    return line
