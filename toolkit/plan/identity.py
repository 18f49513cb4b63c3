"""What makes two recipes the same: hashes of their canonical JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any

from toolkit.recipe.schema import Recipe

_NOT_TRAINING = {
    "recipe": None,
    "schema": None,
    "cluster": None,
    "strategy": None,
    "launch": None,
    "checkpoint": None,
    "model": ("attention", "activation_checkpointing", "compile"),
    "data": ("samples",),
    "batch": ("per_device", "gpus", "accumulation"),
    "evaluation": ("per_device",),
    "optimizer": ("implementation",),
    "loss": None,
    "anomalies": ("max_skipped",),
}
"""What changes how a training is computed but not, beyond rounding, what is learnt."""


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe without logging, description and absolute paths."""
    return plain_sha256(recipe.model_dump(by_alias=True))


def plain_sha256(recipe: dict[str, Any]) -> str:
    """The same of a resolved recipe as it stands in a record, whatever keys this version knows."""
    return _sha256(_identity(recipe))


def training_sha256(recipe: Recipe) -> str:
    """The same, also without the split, cluster, strategy and launcher."""
    plain = _identity(recipe.model_dump(by_alias=True))
    for section, keys in _NOT_TRAINING.items():
        if keys is None:
            plain.pop(section, None)
        elif isinstance(plain.get(section), dict):
            plain[section] = {k: v for k, v in plain[section].items() if k not in keys}
    return _sha256(plain)


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in recipe.items() if k not in ("logging", "description")}
    return _without_absolute_paths(plain)  # type: ignore[no-any-return]


def _without_absolute_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_absolute_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_absolute_paths(item) for item in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value


def _sha256(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
