"""The recipe's `schedule` and `duration` sections: the learning rate over the steps, and their number."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from drumline.recipe.section import (
    AddedLater,
    Count,
    Epochs,
    Fraction,
    NonNegative,
    Positive,
    Ratio,
    Section,
)


class Schedule(Section):
    """The learning rate as a function of the optimizer step; formulas in `plan/schedule.py`.

    `horizon_steps`: the steps that the curve is drawn over, where they are not those of the run; a longer run
    keeps the last rate.
    `warmup_start_ratio`: the rate before the first step, as a share of the peak. `min_lr`: the end of the
    curve, where `min_lr_ratio` states it as a share of the peak.
    """

    name: Literal[
        "constant",
        "linear",
        "cosine",
        "cosine_restarts",
        "polynomial",
        "inverse_sqrt",
        "wsd",
        "one_cycle",
        "piecewise",
    ] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Fraction | None = None
    warmup_epochs: Annotated[Epochs | None, AddedLater()] = None
    warmup_start_ratio: Annotated[Ratio, AddedLater()] = 0.0
    min_lr_ratio: Ratio = 0.0
    min_lr: Annotated[NonNegative | None, AddedLater()] = None
    horizon_steps: Annotated[Count | None, AddedLater()] = None
    unit: Literal["step", "epoch"] = "step"
    cycles: Count = 1
    power: Positive = 1.0
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    start_ratio: Ratio = 0.04
    milestones: dict[str, Ratio] = {}

    @model_validator(mode="after")
    def _keys_belong_to_the_shape(self) -> Self:
        owner = {
            "cycles": "cosine_restarts",
            "power": "polynomial",
            "decay_ratio": "wsd",
            "start_ratio": "one_cycle",
            "milestones": "piecewise",
        }
        for key, name in owner.items():
            default = type(self).model_fields[key].default
            if name != self.name and getattr(self, key) != default:
                raise ValueError(f"{key} belongs to schedule {name}, not {self.name}")
        given = {
            key: value
            for key in ("warmup_steps", "warmup_ratio", "warmup_epochs")
            if (value := getattr(self, key)) is not None
        }
        if len(given) > 1:
            stated = " and ".join(f"{key} {value}" for key, value in given.items())
            raise ValueError(f"{stated} exclude each other; keep one")
        if self.min_lr is not None and self.min_lr_ratio:
            raise ValueError(
                f"min_lr {self.min_lr:g} and min_lr_ratio {self.min_lr_ratio:g} exclude each other; keep one"
            )
        if self.warmup_start_ratio and self.name == "one_cycle":
            raise ValueError(
                "warmup_start_ratio: one_cycle begins at its own start_ratio. Nearest: "
                f"start_ratio {self.warmup_start_ratio:g}"
            )
        if self.name == "piecewise":
            _check_milestones(self.milestones)
        return self


class Duration(Section):
    """How long to train: exactly one of steps, epochs, tokens (ends at the first step that reaches it)."""

    steps: Count | None = None
    epochs: Epochs | None = None
    tokens: Count | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of steps, epochs, tokens; given: {', '.join(given) or 'none'}"
                + (" (set the other to null)" if given else "")
            )
        return self


def _check_milestones(milestones: dict[str, float]) -> None:
    """Check that the keys ascend, all fractions of the run or all steps: {"0.5": 0.1} or {"1000": 0.1}."""
    if not milestones:
        raise ValueError('piecewise needs milestones, such as {"0.5": 0.1, "0.75": 0.01}')
    try:
        places = [float(place) for place in milestones]
    except ValueError:
        raise ValueError(f"milestones: {list(milestones)} must be numbers in quotes") from None
    if places != sorted(places) or not all(0 < place < 1e15 for place in places):
        raise ValueError(f"milestones: {places} must ascend from above 0")
    if any(place > 1 and place != int(place) for place in places):
        raise ValueError(f"milestones: {places}: a step is a whole number, a fraction is below 1")
    for text, place in zip(milestones, places, strict=True):
        if place >= 1 and not text.isdigit():
            raise ValueError(
                f"milestones: {text!r}: a fraction of the run is below 1, a step is written without a "
                f"point. Nearest: a fraction such as 0.9, or the step {str(int(place))!r} in quotes"
            )
    fractions = [place < 1 for place in places]
    if any(fractions) and not all(fractions):
        raise ValueError(f"milestones: {places} mixes fractions of the run with steps")
