"""Writes an imported recipe as YAML, with a comment where a choice was made."""

from typing import Any

from drumline.recipe import yaml12
from drumline.recipe.schema import Recipe
from drumline.session.importing.draft import Draft


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; `a.0` and `a.1` as the items of a list."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        parts, place = key.split("."), found
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    return _with_lists(found)  # type: ignore[no-any-return]


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and set(value) <= {"0", "1"}:
        defaults = {"0": 0.9, "1": 0.999}
        return [value.get(place, default) for place, default in defaults.items()]
    return {key: _with_lists(one) for key, one in value.items()}


def text_of(draft: Draft, head: list[str]) -> str:
    """The recipe's YAML in the order of its schema; `head`: lines of comments before it."""
    whole = nested(draft.keys)
    order = [field.alias or name for name, field in Recipe.model_fields.items()]
    lines = [f"# {line}".rstrip() for line in head]
    for section in sorted(whole, key=order.index):
        lines += _section(section, whole[section], draft)
    return "\n".join(lines) + "\n"


def _section(name: str, value: Any, draft: Draft) -> list[str]:
    if not isinstance(value, dict):
        return [_line(name, value, draft.comments.get(name, ""), "")]
    lines = [f"{name}:"]
    for key, one in value.items():
        path = f"{name}.{key}"
        comment = draft.comments.get(path, "")
        inner = [draft.comments[k] for k in draft.comments if k.startswith(f"{path}.")]
        lines.append(_line(key, one, "; ".join(filter(None, [comment, *inner])), "  "))
    return lines


def _line(key: str, value: Any, comment: str, indent: str) -> str:
    text = yaml12.dump({key: value}).strip()
    if isinstance(value, dict | list):
        text = f"{key}: {yaml12.dump_flow(value)}"
    ending = f"    # {comment}" if comment else ""
    return f"{indent}{text}{ending}"
