"""What the keys of a recipe mean: keys.yaml together with the types, limits and defaults of the schema."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from drumline.errors import RecipeError
from drumline.recipe import yaml12
from drumline.recipe.other_names import NotOffered, keys_for
from drumline.recipe.schema import Recipe


@dataclass(frozen=True)
class Key:
    """A key of a recipe by its dotted name.

    `kind`: its type in words, with its limits or choices. `default`: as YAML, in words, or `required`.
    `example`: a value as YAML; `page`: of docs/; `is_section`: whether it has keys of its own.
    """

    name: str
    meaning: str
    unit: str
    kind: str
    default: str
    example: str
    page: str
    is_section: bool


@cache
def keys() -> dict[str, Key]:
    """All keys by their dotted names, in the order of the schema; keys of list items have no number."""
    return {
        name: _key(name, node, required, own)
        for name, node, required, own in _walk(_plain_schema())
    }


def find_key(name: str) -> Key:
    """The key of a dotted name, or of its last part where only one has it; RecipeError names near ones."""
    found = keys()
    if name in found:
        return found[name]
    same = [key for key in found if key.rpartition(".")[2] == name]
    if len(same) == 1:
        return found[same[0]]
    if same:
        raise RecipeError(f"{name}: several keys are called so. Nearest: {', '.join(same)}")
    for ours in _of_other_tools(name):
        if ours in found:
            return found[ours]
    near = get_close_matches(
        name, [*found, *(key.rpartition(".")[2] for key in found)], n=1, cutoff=0.75
    )
    if near:
        raise RecipeError(f"{name}: no key of a recipe. Nearest: {near[0]}")
    raise RecipeError(
        f"{name}: no key of a recipe. Nearest: a section: {', '.join(k.name for k in keys_in(''))}"
    )


_WORDS = {
    "fsdp": "strategy.name", "deepspeed": "strategy.name", "zero": "strategy.name", "ddp": "strategy.name",
    "lora": "model.adapter", "qlora": "model.quantization", "peft": "model.adapter", "dataset": "data",
}  # fmt: skip
"""Words that people look up, which are no names of keys."""


def _of_other_tools(name: str) -> list[str]:
    """Keys of ours for another tool's name, whatever kind of value it takes there, or for a common word."""
    word = re.sub(r"[^a-z]", "", name.lower())
    if word in _WORDS:
        return [_WORDS[word]]
    for value in (
        True,
        1,
        0.5,
        "adamw",
        "cosine",
        "wandb",
        "sdpa",
        "q_proj",
        ["wandb"],
        {"min_lr": 0.0},
    ):
        try:
            ours = keys_for(name, value)
        except (NotOffered, TypeError, ValueError):
            continue
        if ours:
            return list(ours)
    return []


def keys_in(section: str) -> list[Key]:
    """The keys right below a section."""
    depth = section.count(".") + 1 if section else 0
    start = f"{section}." if section else ""
    return [
        key
        for key in keys().values()
        if key.name.startswith(start) and key.name.count(".") == depth
    ]


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, with descriptions, defaults and examples, for editors.

    Also of recipes with `extends`, whose other keys may be missing. What keys say together, such as the batch
    equation, no JSON Schema holds; `drumline plan` checks it.
    """
    whole = _plain_schema()
    for name, node, _, section in _walk(whole):
        told = _told(name, section)
        node.pop("title", None)
        unit = f" [{told['unit']}]" if told.get("unit") else ""
        default = f" Default: {told['default']}." if told.get("default") else ""
        node["description"] = f"{told['is']}{unit}{default}"
        if examples := _examples(told):
            node["examples"] = examples
    definitions = whole.pop("$defs")
    for one in definitions.values():
        one.pop("title", None)
        one.pop("description", None)
    extends = {
        "type": "string",
        "description": "Take another recipe, a file or a shipped name, as the base.",
    }
    partial = _without_required({"Recipe": whole, **definitions})
    partial["Recipe"]["properties"] = {"extends": extends, **partial["Recipe"]["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of drumline",
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/PartOfRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": {
            "Recipe": whole,
            **definitions,
            **{f"PartOf{name}": _renamed(one) for name, one in partial.items()},
        },
    }


def _without_required(node: Any) -> Any:
    """The node, at any depth without the keys that must be there."""
    if isinstance(node, dict):
        return {
            key: _without_required(value)
            for key, value in node.items()
            if not (key == "required" and isinstance(value, list))
        }
    return [_without_required(one) for one in node] if isinstance(node, list) else node


def _renamed(node: Any) -> Any:
    """The node with references to the definitions that require nothing."""
    if isinstance(node, dict):
        return {
            key: value.replace("#/$defs/", "#/$defs/PartOf") if key == "$ref" else _renamed(value)
            for key, value in node.items()
        }
    return [_renamed(one) for one in node] if isinstance(node, list) else node


def _plain_schema() -> dict[str, Any]:
    return copy.deepcopy(Recipe.model_json_schema())


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool, str]]:
    """Every key: its dotted name, its node, whether it is required, and the section that keys.yaml has it in.

    A definition that several keys share is walked once.
    """
    definitions, seen = schema["$defs"], set()

    def below(
        node: dict[str, Any], prefix: str, section: str
    ) -> Iterator[tuple[str, dict[str, Any], bool, str]]:
        for name, own in node["properties"].items():
            dotted = f"{prefix}.{name}" if prefix else name
            yield dotted, own, name in node.get("required", ()), section
            for inner in _references(own):
                if inner not in seen:
                    seen.add(inner)
                    yield from below(definitions[inner], dotted, dotted)

    yield from below(schema, "", "")


def _references(node: Any) -> list[str]:
    """Names of the definitions that a node can be, or can hold."""
    if isinstance(node, list):
        return [name for one in node for name in _references(one)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"].rpartition("/")[2]] if "$ref" in node else []
    return own + [
        name
        for key in ("anyOf", "oneOf", "allOf", "items", "additionalProperties")
        for name in _references(node.get(key))
    ]


@cache
def _texts() -> dict[str, dict[str, dict[str, Any]]]:
    path = Path(__file__).parent / "keys.yaml"
    return yaml12.parse(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _told(name: str, section: str) -> dict[str, Any]:
    """What keys.yaml says of a key; of a source's, what it says of those of `data`."""
    last = name.rpartition(".")[2]
    for place in (section, "data"):
        if found := _texts().get(place, {}).get(last):
            return found
    raise KeyError(name)


def _examples(told: dict[str, Any]) -> list[Any]:
    """The examples of a key: one, or several of different kinds."""
    return told.get("examples") or ([told["example"]] if "example" in told else [])


def _key(name: str, node: dict[str, Any], required: bool, section: str) -> Key:
    told = _told(name, section)
    examples = _examples(told)
    return Key(
        name=name,
        meaning=told["is"],
        unit=told.get("unit", ""),
        kind=_kind(node),
        default=_default(told, node, required),
        example=yaml12.dump_flow(examples[0]) if examples else "",
        page=told.get("see", ""),
        is_section=bool(_references(node)),
    )


def _default(told: dict[str, Any], node: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    stated = node.get("default")
    if "default" in told or (_references(node) and isinstance(stated, dict)):
        return str(told.get("default", "those of its keys"))
    return "none" if stated is None else yaml12.dump_flow(stated)


def _kind(node: dict[str, Any]) -> str:
    """A node's type in words."""
    if "enum" in node:
        return ", ".join(yaml12.dump_flow(one) for one in node["enum"])
    if "const" in node:
        return yaml12.dump_flow(node["const"])
    if "$ref" in node:
        return "keys of its own"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in node:
            kinds = [
                _kind({**one, **_limits(node)}) for one in node[key] if one.get("type") != "null"
            ]
            kinds = [
                one for one in kinds if one.removeprefix("whole ") == one or one[6:] not in kinds
            ]
            return " or ".join(dict.fromkeys(kinds))
    kind = node.get("type")
    if kind == "array":
        return f"list of {_kind(node.get('items', {}))}"
    if kind == "object":
        return "mapping"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
    }
    return " ".join(filter(None, [words.get(str(kind), "any value"), _limit_words(node)]))


def _limits(node: dict[str, Any]) -> dict[str, Any]:
    return {key: node[key] for key in _LIMITS if key in node}


_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "gt": "above",
    "maximum": "at most",
    "le": "at most",
    "exclusiveMaximum": "below",
}


def _limit_words(node: dict[str, Any]) -> str:
    """Limits that say something: not those that only keep numbers finite."""
    told = [
        f"{word} {node[key]:g}"
        for key, word in _LIMITS.items()
        if key in node and abs(node[key]) < 1e9
    ]
    return ", ".join(dict.fromkeys(told))
