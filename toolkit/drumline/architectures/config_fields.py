"""Fields of every config class of transformers, and their types, read from config_fields.txt.

One line per architecture: its name, then `field:types` with a letter for each type that the field takes:
i int, f float, b bool, s str, l list, d mapping, n null. No letter: any type, of a key that the model reads
though its config class has no such field. `tests/plan/test_config_fields.py` makes the table.
"""

from functools import cache
from pathlib import Path
from typing import Any

from drumline.errors import PlanError

_FILE = Path(__file__).with_name("config_fields.txt")
_NAMES = {"i": "a whole number", "f": "a number with a point", "b": "true or false", "s": "text",
          "l": "a list", "d": "a mapping", "n": "null"}  # fmt: skip
_COMMON = "*"
"""The line of fields that every architecture has."""
_KWARGS = {"num_labels": "i"}
_ROPE_KWARGS = {"rope_theta": "if", "rope_scaling": "dn"}
"""Keys that the base class takes besides its fields; the second two become `rope_parameters`."""
_SAID_ELSEWHERE = {
    "dtype": "the recipe's precision",
    "torch_dtype": "the recipe's precision",
    "return_dict": "leave it out: the loss is read from named outputs",
    "architectures": "model.architecture",
}
"""Keys that a config takes and drumline replaces, and what to state instead."""


@cache
def config_fields(architecture: str) -> dict[str, str] | None:
    """Field -> letters of its types; None for an architecture that the table lacks."""
    own, common = _line(architecture), _line(_COMMON) or {}
    if own is None:
        return None
    rope = _ROPE_KWARGS if "rope_parameters" in own else {}
    return {**common, **_KWARGS, **rope, **own}


def check_config(architecture: str, config: dict[str, Any]) -> None:
    """Raise PlanError for a key that the architecture's config lacks, or a value of another type.

    transformers keeps unknown keys without using them, and other types end in a traceback in the ranks.
    """
    fields = config_fields(architecture)
    if fields is None:
        return
    for key, value in config.items():
        if key in _SAID_ELSEWHERE:
            raise PlanError(
                f"model.config.{key}: has no effect here. Nearest: {_SAID_ELSEWHERE[key]}"
            )
        if key not in fields:
            raise PlanError(
                f"model.config.{key}: {architecture} has no such key{_nearest(key, fields)}"
            )
        if fields[key] and _letter(value) not in fields[key]:
            legal = " or ".join(_NAMES[letter] for letter in fields[key])
            raise PlanError(
                f"model.config.{key}: {value!r} is {_NAMES[_letter(value)]}, {architecture} takes {legal}"
                f"{_nearest_value(value, fields[key])}"
            )


def _letter(value: Any) -> str:
    if value is None:
        return "n"
    kinds = ((bool, "b"), (int, "i"), (float, "f"), (str, "s"), (list, "l"), (dict, "d"))
    return next(letter for kind, letter in kinds if isinstance(value, kind))


def _nearest(key: str, fields: dict[str, str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, fields, n=1, cutoff=0.6)
    return f". Did you mean {close[0]!r}?" if close else ""


def _nearest_value(value: Any, letters: str) -> str:
    """The same value in a type that the field takes, as YAML; "" if there is none."""
    if isinstance(value, str) and "b" in letters and value.lower() in ("yes", "no", "on", "off"):
        return f". Nearest: {str(value.lower() in ('yes', 'on')).lower()}"
    if isinstance(value, float) and value.is_integer() and "i" in letters:
        return f". Nearest: {int(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and "f" in letters:
        return f". Nearest: {float(value)}"
    return ""


def _line(name: str) -> dict[str, str] | None:
    text = _text()
    start = text.find(f"\n{name} ")
    if start < 0:
        return None
    words = text[start + 1 : text.index("\n", start + 1)].split(" ")[1:]
    return {field: types for field, _, types in (word.partition(":") for word in words)}


@cache
def _text() -> str:
    return "\n" + _FILE.read_text(encoding="utf-8")
