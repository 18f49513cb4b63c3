"""Identity of a recipe: SHA-256 hashes of its canonical JSON."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from drumline.recipe.data_section import OtherSource
from drumline.recipe.schema import Recipe
from drumline.recipe.section import AddedLater, Section, came_later

_NOT_TRAINING = {
    "recipe": None,
    "schema": None,
    "cluster": None,
    "strategy": None,
    "launch": None,
    "checkpoint": None,
    "model": ("attention", "activation_checkpointing", "activation_offload", "compile"),
    "data": ("samples", "workers"),
    "batch": ("per_device", "gpus", "accumulation"),
    "evaluation": ("per_device", "after"),
    "optimizer": ("implementation",),
    "loss": ("chunked",),
    "objective": ("reference",),
    "anomalies": ("max_skipped",),
}
"""Keys that `training_sha256` leaves out (None: the whole section). They affect how a run is computed, but
its result only up to rounding."""

_SETS = ("evaluation", "mixture")
"""Keys of `data` that hold sets of data, with keys of their own."""


def hashes(recipe: Recipe) -> tuple[str, str]:
    """`recipe_sha256` and `training_sha256`, from one pass over the recipe."""
    plain = _identity(recipe.model_dump(by_alias=True))
    return _sha256(plain), _sha256(_training(plain))


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe without logging, description and absolute paths."""
    return plain_sha256(recipe.model_dump(by_alias=True))


def plain_sha256(recipe: dict[str, Any]) -> str:
    """The same for a recipe read back from a run's record; it may have keys unknown to this version."""
    return _sha256(_identity(recipe))


def training_sha256(recipe: Recipe) -> str:
    """The same, also without the keys in `_NOT_TRAINING`: split, cluster, strategy, launcher and others."""
    return _sha256(_training(_identity(recipe.model_dump(by_alias=True))))


def _training(plain: dict[str, Any]) -> dict[str, Any]:
    plain = dict(plain)
    for section, keys in _NOT_TRAINING.items():
        if keys is None:
            plain.pop(section, None)
        elif isinstance(plain.get(section), dict):
            plain[section] = {k: v for k, v in plain[section].items() if k not in keys}
            if not plain[section]:  # as before the section had keys that matter
                del plain[section]
    return plain


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in recipe.items() if k not in ("logging", "description")}
    for section, key, absent in _later_keys():
        if section is None and plain.get(key) in absent:
            plain.pop(key, None)
        elif section is not None and isinstance(plain.get(section), dict):
            values = plain[section]
            if key in values and values[key] in absent:
                plain[section] = {k: v for k, v in values.items() if k != key}
    if isinstance(plain.get("data"), dict):
        sets = {key: _sets(plain["data"][key]) for key in _SETS if plain["data"].get(key)}
        plain["data"] = {**plain["data"], **sets}
    return _without_absolute_paths(plain)  # type: ignore[no-any-return]


def _sets(value: Any) -> Any:
    """Sets of data, by name or in a list, without the keys that came later and state nothing."""
    if isinstance(value, list):
        return [_sets(own) for own in value]
    later = {key for key, field in OtherSource.model_fields.items() if came_later(field)}
    return {
        key: _sets(own) if isinstance(own, dict) else own
        for key, own in value.items()
        if key not in later or own is not None
    }


@cache
def _later_keys() -> list[tuple[str | None, str, list[Any]]]:
    """(section or None, key, values) of every key added after the first release.

    Such a key is left out of the hash at these values, so that recipes written before it existed keep their
    hash.
    """
    found: list[tuple[str | None, str, list[Any]]] = []
    for name, field in Recipe.model_fields.items():
        if came_later(field):
            found.append((None, name, _absent(field)))
        candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for section in candidates:
            if isinstance(section, type) and issubclass(section, Section):
                found += [
                    (name, key, _absent(inner))
                    for key, inner in section.model_fields.items()
                    if came_later(inner)
                ]
    return found


def _absent(field: Any) -> list[Any]:
    """The default, and what recipes of before the key meant."""
    (mark,) = (mark for mark in field.metadata if isinstance(mark, AddedLater))
    return [_plain(field.default), *([] if mark.before is None else [mark.before])]


def _plain(default: Any) -> Any:
    return default.model_dump(by_alias=True) if isinstance(default, Section) else default


def _without_absolute_paths(value: Any, key: str = "") -> Any:
    """The same without places, which are not content: absolute paths, and the URLs of `path` keys."""
    if isinstance(value, dict):
        return {name: _without_absolute_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_absolute_paths(item, key) for item in value]
    is_url = key == "path" and isinstance(value, str) and "://" in value
    return None if is_url or (isinstance(value, str) and Path(value).is_absolute()) else value


def _sha256(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
