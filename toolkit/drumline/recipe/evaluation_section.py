"""The recipe's `evaluation` and `early_stopping` sections, and the commands that checkpoints are owed."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from drumline.recipe.section import (
    AddedLater,
    Count,
    Epochs,
    Name,
    NonNegative,
    Positive,
    Section,
    Slug,
)


class After(Section):
    """A command that is run on a saved checkpoint, every so many steps or epochs and after the last step.

    `run`: its words, in which {checkpoint}, {run}, {step} and {numbers} are filled in; no shell reads them.
    The numbers that it writes to {numbers}, or as a JSON object in its last line of output, become
    `after/<name>/…` in the metrics. `name`: by default the command's.
    """

    name: Slug | None = None
    every_steps: Count | None = None
    every_epochs: Epochs | None = None
    run: Annotated[list[Name], Field(min_length=1)]
    timeout_minutes: Positive | None = None

    @model_validator(mode="after")
    def _has_one_cadence(self) -> Self:
        _require_one_cadence(self.every_steps, self.every_epochs)
        return self

    @property
    def label(self) -> str:
        """What it is called in files and metrics."""
        command = self.run[0].rpartition("/")[2].lower()
        return self.name or re.sub(r"[^a-z0-9._-]+", "-", command).strip("-._") or "command"


def _require_one_cadence(steps: int | None, epochs: float | None) -> None:
    if (steps is None) == (epochs is None):
        both = "both" if steps else "neither"
        raise ValueError(f"exactly one of every_steps and every_epochs; given: {both}")


class Evaluation(Section):
    """Evaluation on the rows for it, every so many optimizer steps or epochs, and after the last step.

    `at_start`: also before the first one. `after`: commands that are run on saved checkpoints, beside the
    training; with them, there need be no rows to evaluate.
    """

    every_steps: Count | None = None
    every_epochs: Annotated[Epochs | None, AddedLater()] = None
    at_start: Annotated[bool, AddedLater()] = False
    per_device: Count | None = None
    after: Annotated[list[After], AddedLater()] = []

    @property
    def has_rows(self) -> bool:
        """Whether rows are evaluated."""
        return self.every_steps is not None or self.every_epochs is not None

    @model_validator(mode="after")
    def _has_one_cadence(self) -> Self:
        if self.has_rows or not self.after:
            _require_one_cadence(self.every_steps, self.every_epochs)
        elif self.at_start:
            raise ValueError(
                "at_start: there are no rows to evaluate without every_steps or every_epochs"
            )
        labels = [one.label for one in self.after]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"after: two commands are called {twice}. Nearest: a name for each")
        return self


class EarlyStopping(Section):
    """Stop when the metric has not improved by `min_delta` for `patience` evaluations."""

    metric: Annotated[str, Field(pattern=r"^eval/([a-z0-9][a-z0-9._-]*/)?[a-z0-9_]+$")] = (
        "eval/loss"
    )
    mode: Literal["min", "max"] | None = None
    patience: Count = 5
    min_delta: NonNegative = 0.0
