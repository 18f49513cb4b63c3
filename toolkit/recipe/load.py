"""From YAML files and `key.path=value` overrides to a validated Recipe."""

import os
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from toolkit.errors import RecipeError
from toolkit.recipe import catalogue, yaml12
from toolkit.recipe.schema import Recipe
from toolkit.secrets import secrets_in

_UNION_BRANCH = re.compile(r"constrained-\w+|function-\w+\[.*\]|list\[.*\]|str|int")
PATH_KEYS = (("data", "path"), ("data", "tokenizer"), ("model", "path"))


def load_recipe(where: str, overrides: list[str] | None = None) -> Recipe:
    """Read a file or a shipped recipe's name, apply `extends:` and overrides, validate."""
    path = catalogue.find(where)
    raw = _read_mapping(path)
    base_name = raw.pop("extends", None)
    if base_name is not None:
        raw = merge(_read_base(path, base_name), raw)
    return _overridden(raw, overrides, str(path))


def override(recipe: Recipe, overrides: list[str] | None) -> Recipe:
    """A recipe with `key.path=value` overrides on top."""
    return _overridden(recipe.model_dump(by_alias=True), overrides, "recipe")


def _overridden(raw: dict[str, Any], overrides: list[str] | None, origin: str) -> Recipe:
    cwd, merged = Path.cwd(), raw
    for text in overrides or []:
        merged = merge(merged, _absolute_paths(parse_override(text), cwd))
    return validate(merged, "command line" if overrides and _is_valid(raw) else origin)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, everything else (lists too) is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def parse_override(text: str) -> dict[str, Any]:
    """`optimizer.lr=1e-3` as a nested mapping, the value read as YAML."""
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
    """The Recipe of a plain mapping; every problem in one message, each with its path and value."""
    if isinstance(raw.get("strategy"), dict) and "parallel" in str(raw["strategy"].get("name", "")):
        raise RecipeError(
            f"{origin}: strategy.name: {raw['strategy']['name']!r}: drumline splits the batch only; "
            "tensor and pipeline parallelism are not offered. Nearest: fsdp"
        )
    found = list(secrets_in(raw))
    if found:
        raise RecipeError(
            f"{origin}: {found[0]}: secrets do not belong in a recipe, which is written into records and "
            "trackers. Nearest: an environment variable"
        )
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        items = _one_branch(error.errors(include_url=False))
        lines = [_explain(item) for item in items]
        meant = {line.partition("Did you mean '")[2].rstrip("'?") for line in lines}
        kept = [
            line
            for item, line in zip(items, lines, strict=True)
            if item["type"] != "missing" or _keys_of(item)[-1] not in meant
        ]
        raise RecipeError("\n".join(f"{origin}: {line}" for line in kept)) from None


def _is_valid(raw: dict[str, Any]) -> bool:
    try:
        Recipe.model_validate(raw)
    except ValidationError:
        return False
    return True


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        raw = yaml12.parse(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise RecipeError(f"{path}: {found}; a recipe is a mapping that begins with `recipe:`")
    if _names_a_factory(raw):
        raw.setdefault("project", ".")
    return _absolute_paths(raw, path.resolve().parent)


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
    sections = (raw.get("model"), raw.get("data"))
    return any(isinstance(section, dict) and "factory" in section for section in sections)


def _absolute_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths count from the recipe's folder (in overrides: from the current one)."""
    result = dict(raw)
    for section, key in PATH_KEYS:
        values = result.get(section)
        if isinstance(values, dict) and key in values:
            result[section] = {**values, key: _absolute(key, values[key], folder)}
    if isinstance(result.get("project"), str):
        result["project"] = _expanded(result["project"], folder)
    return result


def _absolute(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(key, item, folder) for item in value]
    if not isinstance(value, str) or (key == "tokenizer" and not value.startswith((".", "~", "/"))):
        return value
    return _expanded(value, folder)


def _expanded(value: str, folder: Path) -> str:
    try:
        return str(Path(os.path.normpath(folder / Path(value).expanduser())))
    except RuntimeError:
        raise RecipeError(f"{value}: no such user") from None


def _one_branch(items: list[Any]) -> list[Any]:
    """Of a union's branches, the errors of the one that the value was meant for."""
    kept = []
    for item in items:
        others = [
            o
            for o in items
            if o is not item and _keys_of(o)[: len(_keys_of(item))] == _keys_of(item)
        ]
        is_container = isinstance(item["input"], dict | list)
        scalar_branch = item["type"] in ("int_type", "string_type") and is_container
        container_branch = item["type"] in ("model_type", "list_type") and not is_container
        if not (others and (scalar_branch or container_branch)):
            kept.append(item)
    return kept


def _keys_of(item: Any) -> list[str]:
    """An error's place as recipe keys, without pydantic's names for a union's branches."""
    loc = [str(part) for part in item["loc"]]
    own = 1 if item["type"] == "extra_forbidden" else 0  # the user's key, whatever it looks like
    inner = [p for p in loc[: len(loc) - own] if not _UNION_BRANCH.fullmatch(p)]
    return inner + loc[len(loc) - own :]


def _explain(item: Any) -> str:
    """One pydantic error in the house's form: path, value, what is wrong, nearest legal fix."""
    loc = _keys_of(item)
    path = ".".join(loc)
    value, kind = item["input"], item["type"]
    if kind == "extra_forbidden":
        section = _section_at(loc[:-1])
        deeper = (
            [k for k in _keys(Recipe) if loc[-1] in _keys(_section_at([k]))]
            if len(loc) == 1
            else []
        )
        if deeper:
            return f"{path}: unknown key. Did you mean '{deeper[0]}.{path}'?"
        return f"{path}: unknown key{_did_you_mean(loc[-1], _keys(section), 'keys here')}"
    if kind == "missing":
        return f"{path}: missing; the recipe needs it"
    if kind == "literal_error":
        legal = [str(choice) for choice in _literals(loc)] or [item["ctx"]["expected"]]
        return (
            f"{path}: {value!r} is not one of the choices{_did_you_mean(value, legal, 'choices')}"
        )
    message = item["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {value!r}: {message[0].lower()}{message[1:]}"


def _section_at(loc: list[str]) -> type[BaseModel] | None:
    section: Any = Recipe
    for part in loc:
        field = next((f for n, f in section.model_fields.items() if (f.alias or n) == part), None)
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((c for c in candidates if _is_section(c)), None)
        if section is None:
            return None
    return section  # type: ignore[no-any-return]


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _keys(section: type[BaseModel] | None) -> list[str]:
    if section is None:
        return []
    keys = [field.alias or name for name, field in section.model_fields.items()]
    return [*keys, "extends"] if section is Recipe else keys


def _literals(loc: list[str]) -> list[Any]:
    section = _section_at(loc[:-1])
    field = section.model_fields.get(loc[-1]) if section else None
    return list(get_args(field.annotation)) if field else []


def _did_you_mean(word: Any, legal: list[str], noun: str) -> str:
    from difflib import get_close_matches

    by_lower = {choice.lower(): choice for choice in legal}
    close = get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f". Did you mean {by_lower[close[0]]!r}?"
    return f" ({noun}: {', '.join(legal)})" if legal else ""
