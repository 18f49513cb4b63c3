"""Turns pydantic's errors into drumline's messages: path, value, what is wrong, nearest legal fix."""

import json
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_UNION_BRANCH = re.compile(r"constrained-\w+|function-\w+\[.*\]|list\[.*\]|str|int")


def explain(error: ValidationError, root: type[BaseModel], origin: str) -> str:
    """Describe every error in a mapping that failed validation as `root`, one line each."""
    items = _one_branch(error.errors(include_url=False))
    lines = [_explain(item, root) for item in items]
    meant = {line.partition("Did you mean '")[2].rstrip("'?") for line in lines}
    kept = [
        line
        for item, line in zip(items, lines, strict=True)
        if item["type"] != "missing" or _keys_of(item)[-1] not in meant
    ]
    return "\n".join(f"{origin}: {line}" for line in kept)


def _one_branch(items: list[Any]) -> list[Any]:
    """Of the errors of a union's branches, keep those of the branch that the value was meant for."""
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
    """Return the recipe keys that lead to an error, without pydantic's names of union branches."""
    loc = [str(part) for part in item["loc"]]
    own = 1 if item["type"] == "extra_forbidden" else 0  # the user's key, even if like a branch
    inner = [p for p in loc[: len(loc) - own] if not _UNION_BRANCH.fullmatch(p)]
    return inner + loc[len(loc) - own :]


def _explain(item: Any, root: type[BaseModel]) -> str:
    """Describe one pydantic error: path, value, what is wrong, nearest legal fix."""
    loc = _keys_of(item)
    path = ".".join(loc)
    value, kind = item["input"], item["type"]
    if kind == "extra_forbidden":
        section = _section_at(root, loc[:-1])
        deeper = (
            [k for k in _keys(root) if loc[-1] in _keys(_section_at(root, [k]))]
            if len(loc) == 1
            else []
        )
        if deeper:
            return f"{path}: unknown key. Did you mean '{deeper[0]}.{path}'?"
        if known := _of_another_tool(loc[-1], value):
            return f"{path}: unknown key{known}"
        return f"{path}: unknown key{_did_you_mean(loc[-1], _keys(section), 'keys here')}"
    if kind == "missing":
        return f"{path}: missing; the recipe needs it"
    if kind == "literal_error":
        legal = [str(choice) for choice in _literals(root, loc)] or [item["ctx"]["expected"]]
        is_ours = str(value).lower() in {choice.lower() for choice in legal}
        name = _THEIR_KEYS.get(path, loc[-1])
        if not is_ours and (known := _of_another_tool(name, value)):
            return f"{path}: {value!r} is not one of the choices{known}"
        return (
            f"{path}: {value!r} is not one of the choices{_did_you_mean(value, legal, 'choices')}"
        )
    if kind in ("model_type", "model_attributes_type") and isinstance(value, str):
        keys = _keys(_section_at(root, loc))
        if "name" in keys:
            what = f"{path}: {value!r} is no section of keys"
            legal = [str(choice) for choice in _literals(root, [*loc, "name"])]
            if value in legal or not legal:
                return f"{what}. Nearest: {path}.name={value}"
            known = _of_another_tool(_THEIR_KEYS.get(f"{path}.name", path), value)
            return f"{what}{known or _did_you_mean(value, legal, f'choices of {path}.name')}"
    if kind in ("model_type", "model_attributes_type") and value is None:
        return f"{path}: is empty. Nearest: leave the section out, or give it a key"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{path}: {value!r} is not a whole number. Nearest: {int(value)}"
    message = item["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {value!r}: {message[0].lower()}{message[1:]}"


_THEIR_KEYS = {
    "optimizer.name": "optim",
    "schedule.name": "lr_scheduler",
    "strategy.name": "sharding_strategy",
}
"""What other tools call keys whose values they name in their own way."""


def _of_another_tool(name: str, value: Any) -> str:
    """What a recipe calls what another tool calls so, as an ending of a message; "" for an unknown name."""
    from drumline.recipe.other_names import NotOffered, keys_for

    try:
        found = keys_for(name, value)
    except NotOffered as error:
        return f": {error}"
    except (TypeError, ValueError):
        return ""
    if not found:
        return ""
    return f". Nearest: {' '.join(f'{key}={_written(one)}' for key, one in found.items())}"


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _section_at(root: type[BaseModel], loc: list[str]) -> type[BaseModel] | None:
    section: Any = root
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
    return [*keys, "extends"] if "extends" not in keys and "recipe" in keys else keys


def _literals(root: type[BaseModel], loc: list[str]) -> list[Any]:
    section = _section_at(root, loc[:-1])
    field = section.model_fields.get(loc[-1]) if section else None
    return list(get_args(field.annotation)) if field else []


def _did_you_mean(word: Any, legal: list[str], noun: str) -> str:
    from difflib import get_close_matches

    by_lower = {choice.lower(): choice for choice in legal}
    close = get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f". Did you mean {by_lower[close[0]]!r}?"
    return f" ({noun}: {', '.join(legal)})" if legal else ""
