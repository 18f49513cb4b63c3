"""Optimizer steps: how many there are, which slots each one takes, and where epochs end. Pure.

A slot is a position in the infinite sequence of samples, one epoch's order after the other; slot s is in
epoch s // N + 1. Slots are counted from 0, steps and epochs from 1.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from drumline.errors import PlanError

Remainder = Literal["keep", "drop", "carry"]


@dataclass(frozen=True)
class Clock:
    """Maps steps to slots, for N samples, effective batch B and one remainder rule.

    At the end of an epoch, `keep` makes a smaller step of the remaining samples, `drop` leaves them out, and
    `carry` fills the step with samples of the next epoch. `limit` is the number of slots in the whole run if
    its duration is in epochs; only `carry` uses it.
    """

    samples: int
    effective: int
    remainder: Remainder
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.remainder == "drop" and self.effective > self.samples:
            raise PlanError(
                f"batch.remainder: drop leaves no step: effective {self.effective} > "
                f"{self.samples} samples. Nearest: remainder keep (steps of {self.samples}), "
                f"or effective {self.samples}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; with `carry`, those that begin in the first epoch."""
        whole, rest = divmod(self.samples, self.effective)
        return whole if self.remainder == "drop" or rest == 0 else whole + 1

    def total_for_epochs(self, epochs: float) -> int:
        """Steps of a run of `epochs` epochs; a part of an epoch ends with the first step that reaches it."""
        if self.remainder == "carry":
            return -(-whole_samples(self.samples, epochs) // self.effective)
        return _reached(self.steps_per_epoch, epochs)

    def epochs_done(self, step: int) -> Fraction:
        """Epochs that are complete at the end of a step, and the part of the next one."""
        if self.remainder == "carry":
            return Fraction(self.consumed(step), self.samples)
        return Fraction(step, self.steps_per_epoch)

    def total_for_samples(self, samples: int) -> int:
        """The first step at whose end at least `samples` samples were consumed."""
        if self.remainder == "carry":
            return -(-samples // self.effective)
        per_epoch = self.samples
        if self.remainder == "drop":
            per_epoch -= self.samples % self.effective
        epochs, rest = divmod(samples, per_epoch)
        return epochs * self.steps_per_epoch + -(-rest // self.effective)

    def slots(self, step: int) -> tuple[int, int]:
        """First slot and end slot (exclusive) of a step; the difference is its number of samples."""
        assert step >= 1
        if self.remainder == "carry":
            start = (step - 1) * self.effective
            stop = start + self.effective
            return start, stop if self.limit is None else min(stop, self.limit)
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        start = within * self.effective
        stop = min(start + self.effective, self.samples)
        return epoch * self.samples + start, epoch * self.samples + stop

    def epoch(self, step: int) -> int:
        """The epoch, from 1, in which the step begins."""
        return self.slots(step)[0] // self.samples + 1

    def last_step_of_epoch(self, epoch: int) -> int:
        """The last step that begins in the epoch."""
        if self.remainder == "carry":
            return -(-epoch * self.samples // self.effective)
        return epoch * self.steps_per_epoch

    def consumed(self, step: int) -> int:
        """Samples consumed by the end of a step (0 for step 0), without dropped ones."""
        if step == 0:
            return 0
        if self.remainder == "drop":
            return step * self.effective
        return self.slots(step)[1]


def whole_samples(samples: int, epochs: float) -> int:
    """Samples of so many epochs, rounded up."""
    return _reached(samples, epochs)


def _reached(size: int, epochs: float) -> int:
    """The least whole number that is not below size × epochs, as epochs are written: 0.1 is a tenth."""
    return math.ceil(size * Fraction(str(epochs)))


def is_due(
    step: int, every_steps: int | None, every_epochs: float | None, clock: Clock | None
) -> bool:
    """Whether a step ends a multiple of so many steps, or is the first to reach one of so many epochs."""
    if every_steps is not None:
        return step % every_steps == 0
    if every_epochs is None:
        return False
    assert clock is not None
    every = Fraction(str(every_epochs))
    return clock.epochs_done(step) // every > clock.epochs_done(step - 1) // every


def share(count: int, per_device: int, data_ranks: int, data_rank: int) -> list[tuple[int, int]]:
    """A data rank's micro-batches of a step of `count` samples: (first, end) slots, relative to the step.

    Slot i belongs to micro-batch i ÷ (b·G) and data rank (i mod b·G) ÷ b. A micro-batch that is empty on
    this rank only is (a, a); those empty on every rank are left out, so all ranks' lists are equally long.
    """
    row = per_device * data_ranks
    result = []
    for start in range(0, count, row):
        first = min(start + data_rank * per_device, count)
        result.append((first, min(first + per_device, count)))
    return result
