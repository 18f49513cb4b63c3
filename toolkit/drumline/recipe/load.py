"""From YAML files and `key.path=value` overrides to a validated Recipe."""

import glob
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from drumline.errors import RecipeError
from drumline.files import read_bytes
from drumline.recipe import catalogue, yaml12
from drumline.recipe.problems import explain
from drumline.recipe.schema import Recipe
from drumline.secrets import secrets_in

_FACTORY_KEYS = ("factory", "edits", "task_factory")
PATH_KEYS = (("data", "path"), ("data", "tokenizer"), ("data", "chat_template"), ("model", "path"),
             ("start_from", "run"))  # fmt: skip


def load_recipe(where: str, overrides: list[str] | None = None) -> Recipe:
    """Read a file or a shipped recipe's name, apply `extends:` and overrides, validate."""
    path = catalogue.find(where)
    return _overridden(_extended(_read_mapping(path), path), overrides, str(path))


def recipe_of_mapping(raw: dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """A recipe of keys and values, as a file with them in the current folder would be read."""
    place = Path.cwd() / "recipe"
    return _overridden(_extended(_with_paths(raw, place.parent), place), overrides, "recipe")


def override(recipe: Recipe, overrides: list[str] | None) -> Recipe:
    """Return the recipe with `key.path=value` overrides applied, validated again."""
    return _overridden(recipe.model_dump(by_alias=True), overrides, "recipe")


def _extended(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys merged into those of the recipe that `extends` names; `path`: where they stand."""
    own = dict(raw)
    base_name = own.pop("extends", None)
    return own if base_name is None else merge(_read_base(path, base_name), own)


def _overridden(raw: dict[str, Any], overrides: list[str] | None, origin: str) -> Recipe:
    cwd, merged = Path.cwd(), raw
    for text in overrides or []:
        merged = merge(merged, _absolute_paths(parse_override(text), cwd))
    return validate(merged, "command line" if overrides and _is_valid(raw) else origin)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; any other value, including a list, is replaced by that of `over`."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def parse_override(text: str) -> dict[str, Any]:
    """Parse `optimizer.lr=1e-3` into a nested mapping; the value is read as YAML."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {text!r}: expected key.path=value, such as optimizer.lr=1e-3")
    if parts == ["extends"]:
        raise RecipeError(f"override {text!r}: extends belongs in the recipe's file")
    try:
        result = yaml12.parse(value)
    except RecipeError as error:
        raise RecipeError(f"override {text!r}: {error}") from None
    for part in reversed(parts):
        result = {part: result}
    return result  # type: ignore[no-any-return]


def validate(raw: dict[str, Any], origin: str) -> Recipe:
    """Validate a plain mapping into a Recipe; RecipeError lists all invalid keys with path and value."""
    strategy = raw.get("strategy")
    stated = str(strategy.get("name", "") if isinstance(strategy, dict) else strategy)
    if "parallel" in stated and "data" not in stated:
        raise RecipeError(
            f"{origin}: strategy.name: {stated!r}: drumline splits the batch only; "
            "tensor and pipeline parallelism are not offered. Nearest: fsdp"
        )
    odd = next(_unwritable(raw, ""), None)
    if odd:
        raise RecipeError(f"{origin}: {odd}")
    found = list(secrets_in(raw))
    if found:
        raise RecipeError(
            f"{origin}: {found[0]}: secrets do not belong in a recipe, which is written into records and "
            "trackers. Nearest: an environment variable"
        )
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, origin)) from None


def _unwritable(value: Any, path: str) -> Iterator[str]:
    """Describe values that JSON or a path cannot hold: infinity, NaN, NUL, lone surrogates."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unwritable(key, path)
            yield from _unwritable(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unwritable(item, f"{path}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value} is not a finite number. Nearest: null, or a large number"
    elif isinstance(value, str):
        if "\0" in value:
            yield f"{path}: {value!r} holds a NUL character"
        try:
            value.encode()
        except UnicodeEncodeError:
            yield f"{path}: {value!r} is not Unicode text"


def _is_valid(raw: dict[str, Any]) -> bool:
    try:
        Recipe.model_validate(raw)
    except ValidationError:
        return False
    return True


def _read_mapping(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        raw = yaml12.parse(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping that begins with `recipe:`")
    return _with_paths(raw, path.resolve().parent)


def _with_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Keys as read, with absolute paths, and a project where a factory is named."""
    if _names_a_factory(raw):
        raw = {"project": ".", **raw}
    return _absolute_paths(raw, folder)


def read_text(path: Path) -> str:
    """Read a YAML file; RecipeError if it cannot be read, is too large, or is not UTF-8 text."""
    try:
        return read_bytes(path, yaml12.LARGEST, follow=True).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def _read_base(path: Path, base_name: Any) -> dict[str, Any]:
    if not isinstance(base_name, str):
        raise RecipeError(f"{path}: extends: {base_name!r} is not a file or a recipe's name")
    sibling = path.parent / base_name
    base = _read_mapping(sibling if sibling.is_file() else catalogue.find(base_name))
    if "extends" in base:
        raise RecipeError(
            f"{path}: extends: {base_name} itself extends {base['extends']}; one level is the limit"
        )
    return base


def _names_a_factory(raw: dict[str, Any]) -> bool:
    """Whether any section names a factory, which is code of the recipe's project."""
    sections = [section for section in raw.values() if isinstance(section, dict)]
    sections += [*_evaluation_sets(raw), *_mixture(raw)]
    return any(section.get(key) for section in sections for key in _FACTORY_KEYS)


def _absolute_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make paths absolute, relative to `folder`: the recipe's, or for overrides the current one."""
    result = dict(raw)
    for section, key in PATH_KEYS:
        values = result.get(section)
        if isinstance(values, dict) and key in values:
            result[section] = {**values, key: _absolute((section, key), values[key], folder)}
    if isinstance(result.get("data"), dict):
        result["data"] = _with_absolute_processors(result["data"], folder)
    if _evaluation_sets(raw):
        data = result["data"]
        sets = data["evaluation"]
        moved = (
            _with_absolute_path(sets, folder)
            if _is_alone(sets)
            else {name: _with_absolute_path(own, folder) for name, own in sets.items()}
        )
        result["data"] = {**data, "evaluation": moved}
    if _mixture(raw):
        moved_sources = [_with_absolute_path(own, folder) for own in _mixture(raw)]
        result["data"] = {**result["data"], "mixture": moved_sources}
    if isinstance(result.get("project"), str):
        result["project"] = _expanded(result["project"], folder)
    return result


def _with_absolute_processors(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The data section with folders of processors absolute; a name of the hub stays."""
    result = dict(data)
    for kind in ("image", "audio"):
        section = data.get(kind)
        name = section.get("processor") if isinstance(section, dict) else None
        if isinstance(name, str) and name.startswith((".", "~", "/")):
            result[kind] = {**data[kind], "processor": _expanded(name, folder)}
    return result


def _evaluation_sets(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The sets of `data.evaluation`, one or several by name; none where it is not well formed."""
    data = raw.get("data")
    sets = data.get("evaluation") if isinstance(data, dict) else None
    if not isinstance(sets, dict):
        return []
    found = [sets] if _is_alone(sets) else list(sets.values())
    return found if all(isinstance(own, dict) for own in found) else []


def _mixture(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of `data.mixture`; none where it is not well formed."""
    data = raw.get("data")
    sources = data.get("mixture") if isinstance(data, dict) else None
    if not isinstance(sources, list) or not all(isinstance(own, dict) for own in sources):
        return []
    return sources


def _is_alone(sets: dict[str, Any]) -> bool:
    """Whether these are the keys of one set without a name, and not sets by name."""
    return any(not isinstance(value, dict) for value in sets.values())


def _with_absolute_path(own: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "path" not in own:
        return own
    return {**own, "path": _absolute(("data", "path"), own["path"], folder)}


def _absolute(key: tuple[str, str], value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(key, item, folder) for item in value]
    if not isinstance(value, str) or _is_name(key, value) or "://" in value:
        return value
    return _expanded(value, folder, is_pattern=key == ("data", "path"))


def _is_name(key: tuple[str, str], value: str) -> bool:
    """Whether this names a tokenizer of the hub or a chat template of drumline, and no path."""
    if key == ("data", "chat_template"):
        return "/" not in value and "." not in value
    return key == ("data", "tokenizer") and not value.startswith((".", "~", "/"))


def _expanded(value: str, folder: Path, is_pattern: bool = False) -> str:
    """Make a path absolute; in a pattern, brackets and stars that the user did not write are escaped."""
    head, _, rest = value.partition("/")
    if head.startswith("~"):
        try:
            base = Path(head).expanduser()
        except RuntimeError:
            raise RecipeError(f"{value}: no such user") from None
        inner = rest
    else:
        base, inner = folder, value
    parts = inner.split("/")
    if ".." in parts and not inner.startswith("/"):  # what .. leads to depends on links before it
        last = len(parts) - 1 - parts[::-1].index("..")
        head = os.path.join(base, *parts[: last + 1])
        if not (is_pattern and glob.has_magic("/".join(parts[: last + 1]))):
            base, inner = Path(os.path.realpath(head)), "/".join(parts[last + 1 :])
    start = glob.escape(str(base)) if is_pattern else str(base)
    return str(Path(os.path.normpath(os.path.join(start, inner))))
