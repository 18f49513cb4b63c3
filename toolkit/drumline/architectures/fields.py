"""Reads single values of a transformers config: numbers that must be whole, shares, sides of images. Pure."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError


@dataclass(frozen=True)
class Reading:
    """How the config of one architecture is read.

    `keys`: those that are known. `activation_key` and `activation`: the key of the activation and its
    default; `activations`: the activations that its values stand for, where they have other names. `read`:
    from architecture, config and number of classes to the shape, or a text that says why it is not known.
    `nested`: the key of an inner config that has the fields.
    """

    keys: tuple[str, ...]
    activation_key: str
    activation: str
    read: Callable[..., ModelShape | str]
    nested: str = ""
    activations: Mapping[str, str] = field(default_factory=dict)


def refuse_near_misses(config: dict[str, Any], known: Collection[str]) -> None:
    """Raise PlanError for keys that look misspelt; transformers would silently ignore them."""
    for key in config:
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(key, known, n=1, cutoff=0.88)
            if close:
                raise PlanError(f"model.config.{key}: unknown key. Did you mean {close[0]!r}?")


def whole(config: dict[str, Any], keys: tuple[str, ...], default: int | None) -> int:
    """The value of the first key that is set, or the default; raises PlanError if not a positive integer."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"model.config.{key}: {value!r} is not a whole number above 0")
            return value
    assert default is not None
    return default


def share(config: dict[str, Any], key: str, default: float) -> float:
    """The value of the key, or the default; raises PlanError if not a number from 0 to below 1."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise PlanError(f"model.config.{key}: {value!r} is not a number from 0 to below 1")
    return float(value)


def refuse_remainder(hidden: int, heads: int) -> None:
    """Raise PlanError unless the hidden width divides into heads."""
    if hidden % heads:
        raise PlanError(
            f"model.config: {hidden} hidden / {heads} heads = {hidden / heads:.2f}, not a whole "
            f"number. Nearest: {hidden // heads * heads or heads} or {(hidden // heads + 1) * heads}"
        )


def sides(config: dict[str, Any], key: str, default: int) -> tuple[int, int]:
    """Height and width, which a config states as one number or as two."""
    value = config.get(key)
    if isinstance(value, list | tuple) and len(value) == 2:
        height, width = (whole({key: side}, (key,), None) for side in value)
        return height, width
    side = whole(config, (key,), default)
    return side, side


def differing(config: dict[str, Any], needs: dict[str, Any]) -> str:
    """The first key of `needs` that has another value in the config, with that value; "" if none has.

    A number with a point stands for any but 0.
    """
    for key, needed in needs.items():
        value = config.get(key, needed)
        is_any_number = isinstance(needed, float) and bool(needed) and bool(value)
        if value != needed and not is_any_number:
            return f"{key} {value}"
    return ""
