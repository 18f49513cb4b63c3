"""What all sections of a recipe share: the base class, types of values, rules about keys that go together."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=10**15)]
Samples = Annotated[int, Field(ge=1, le=10**9)]
Name = Annotated[str, Field(min_length=1)]
Epochs = Annotated[int | float, Field(gt=0, le=10**9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
FactoryName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*:[A-Za-z_]\w*$")]


@dataclass(frozen=True)
class AddedLater:
    """Marks a key that came after the first release.

    `plan/identity.py` leaves the key out of a recipe's hash while it has its default, so that a run logged
    before the key existed keeps its hash. `before`: what a recipe of before the key meant, if not the
    default; it is left out as well.
    """

    before: Any = None


class Section(BaseModel):
    """A part of the recipe: unknown keys refused, values never converted, immutable.

    Validators are built once, for the whole recipe, at its first use. Defaults are made with
    `model_construct`, which needs no validator.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, defer_build=True, validate_default=False
    )


def came_later(field: Any) -> bool:
    """Whether a field of a section came after the first release."""
    return any(isinstance(mark, AddedLater) for mark in field.metadata)


def without_later_defaults(value: Any) -> Any:
    """A section as plain values, without the keys that came later and have their defaults, at any depth.

    So what is computed from it does not change when a key is added.
    """
    if isinstance(value, Section):
        fields = type(value).model_fields
        return {
            key: without_later_defaults(getattr(value, key))
            for key, field in fields.items()
            if not (came_later(field) and getattr(value, key) == field.default)
        }
    if isinstance(value, dict):
        return {key: without_later_defaults(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_later_defaults(item) for item in value]
    return value


def require_only(section: Section, key: str, chosen: str, needed: dict[str, str]) -> None:
    """Check that the field of the chosen source is set, and no field of another source."""
    if getattr(section, needed[chosen]) is None:
        raise ValueError(f"{key} {chosen} needs {needed[chosen]}")
    foreign = {field for field in needed.values() if field != needed[chosen]}
    extra = sorted(field for field in foreign if getattr(section, field) is not None)
    if extra:
        raise ValueError(f"{key} {chosen} does not take {', '.join(extra)}")


def require_factory(section: Section, is_custom: bool, keys: tuple[str, ...]) -> None:
    """Check that `custom` has its factory, and that no other name has a key that belongs to `custom`."""
    if is_custom and getattr(section, keys[0]) is None:
        raise ValueError(f"name custom needs {keys[0]}, a module:function")
    defaults = {key: type(section).model_fields[key].default for key in keys}
    foreign = [key for key in keys if getattr(section, key) != defaults[key]]
    if not is_custom and foreign:
        raise ValueError(f"{', '.join(foreign)} belong to name custom")
