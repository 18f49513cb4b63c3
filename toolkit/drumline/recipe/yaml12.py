"""YAML 1.2 scalars on PyYAML's safe loader; duplicate keys are refused.

`1e-3` is a float, `no` a string, `010` ten; there are no dates, merge keys or tags. Text that is larger,
deeper or, with its aliases written out, longer than any recipe is refused before it is composed.
Source: YAML 1.2.2 §10.3, the core schema.
"""

import re
from typing import Any, ClassVar

import yaml

from drumline.errors import RecipeError

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
_LINE_BREAKS = {"\x85", "\u2028", "\u2029", "\ufeff"}
"""Line breaks of YAML 1.1, lost in a plain scalar; text with one is quoted, which escapes them."""

LARGEST = 1 << 20
"""Bytes of the largest YAML file that is read."""
_DEEPEST, _MOST_VALUES = 50, 100_000
_LONGEST_NUMBER = 1000

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BASE):  # type: ignore[misc]
    """PyYAML's safe loader with the core schema's scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str, Any]] = {
        f"tag:yaml.org,2002:{tag}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{tag}"]
        for tag in ("null", "bool", "str", "seq")
    }


def _refuse_tag(loader: Any, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, f"unknown tag {node.tag}", node.start_mark)


def _int(loader: Any, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text):,} digits")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: Any, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        _refuse_tag(loader, node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise RecipeError(f"line {line}: key {key!r} is not a string; write it in quotes")
        if key == "<<":
            raise RecipeError(
                f"line {line}: merge keys (<<) are not part of YAML 1.2. Nearest: repeat the keys, or "
                "`extends:` another recipe"
            )
        if key in result:
            raise RecipeError(f"line {line}: key {key!r} stands twice in one mapping")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(None, _refuse_tag)


def parse(text: str) -> Any:
    """The value of one YAML document; errors name the line."""
    if len(text) > LARGEST:
        raise RecipeError(f"not read: {len(text):,} characters, at most {LARGEST:,}")
    try:
        _refuse_bombs(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply") from None


def _refuse_bombs(text: str) -> None:
    """Raise RecipeError for text that is nested too deeply, or too long once its aliases are written out.

    Reads events only, which needs neither recursion nor memory for what an alias repeats.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values before it
    values = 0
    for event in yaml.parse(text, Loader=_BASE):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                line = _line_of(event)
                raise RecipeError(
                    f"line {line}: not valid YAML: alias *{event.anchor} is unknown, or part of itself"
                )
            values += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(open_nodes) > _DEEPEST:
            raise RecipeError(f"line {_line_of(event)}: nested more than {_DEEPEST} levels deep")
        if values > _MOST_VALUES:
            raise RecipeError(
                f"line {_line_of(event)}: more than {_MOST_VALUES:,} values, with every alias written out"
            )


def _line_of(event: yaml.Event) -> int:
    assert event.start_mark
    return event.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Quotes strings that this module's loader would read as another type, such as `1e-3`."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style='"' if _LINE_BREAKS & set(value) else None
    ),
)
_Dumper.add_representer(
    float,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:float",
        repr(value).replace("inf", ".inf").replace("nan", ".nan"),
    ),
)


def dump(value: Any) -> str:
    """Return YAML text that `parse` reads back to the same value; floats are written by repr, exactly."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_flow(value: Any) -> str:
    """The same on one line: `{a: 1, b: [2, 3]}`."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
        default_flow_style=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")
