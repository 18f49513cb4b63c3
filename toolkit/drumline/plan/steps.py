"""Optimizer steps: how many there are, which slots each one takes, and where epochs end. Pure.

A slot is a position in the infinite sequence of samples, one epoch's order after the other; slot s is in
epoch s // N + 1. Slots are counted from 0, steps and epochs from 1.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from drumline.errors import PlanError

Remainder = Literal["keep", "drop", "carry"]


@dataclass(frozen=True)
class Place:
    """A place between two steps: steps done, samples consumed by them, and the slot of the next sample.

    `of_these`: how many of the samples were of the data that the slots are of; earlier steps may have had
    others.
    """

    step: int = 0
    slot: int = 0
    consumed: int = 0
    of_these: int = 0


@dataclass(frozen=True)
class _Stage:
    """Steps of one effective batch B, over N samples, from a place on."""

    samples: int
    effective: int
    remainder: Remainder
    limit: int | None
    start: Place

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self._steps_in(self.samples)

    def slots(self, step: int) -> tuple[int, int]:
        """First slot and end slot of a step of this stage."""
        start, number = self.start.slot, step - self.start.step - 1
        if self.remainder == "carry":
            first = start + number * self.effective
            stop = first + self.effective
            return first, stop if self.limit is None else min(stop, self.limit)
        epoch, within = divmod(start, self.samples)
        left = self._steps_in(self.samples - within)
        if number >= left:  # the stage began within an epoch, which is over
            more, number = divmod(number - left, self.steps_per_epoch)
            epoch, within = epoch + 1 + more, 0
        first = epoch * self.samples + within + number * self.effective
        return first, min(first + self.effective, (epoch + 1) * self.samples)

    def consumed(self, step: int) -> int:
        """Samples consumed by the end of a step of this stage, and before it."""
        if self.remainder == "drop":
            return self.start.consumed + (step - self.start.step) * self.effective
        return self.start.consumed + self.slots(step)[1] - self.start.slot

    def end(self, step: int) -> Place:
        """The place after a step of this stage."""
        consumed = self.consumed(step)
        of_these = self.start.of_these + consumed - self.start.consumed
        return Place(step, self.slots(step)[1], consumed, of_these)

    def _steps_in(self, samples: int) -> int:
        whole, rest = divmod(samples, self.effective)
        return whole if self.remainder == "drop" or rest == 0 else whole + 1


@dataclass(frozen=True)
class Clock:
    """Maps steps to slots, for N samples, effective batch B and one remainder rule.

    At the end of an epoch, `keep` makes a smaller step of the remaining samples, `drop` leaves them out, and
    `carry` fills the step with samples of the next epoch. `limit` is the number of slots in the whole run if
    its duration is in epochs; only `carry` uses it. `start`: what another run did before, whose steps are
    counted on. `ramp`: (last step, effective) of earlier stages with another batch, in order.
    """

    samples: int
    effective: int
    remainder: Remainder
    limit: int | None = None
    start: Place = Place()
    ramp: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for effective in (*(size for _, size in self.ramp), self.effective):
            if self.remainder == "drop" and effective > self.samples:
                raise PlanError(
                    f"batch.remainder: drop leaves no step: effective {effective} > "
                    f"{self.samples} samples. Nearest: remainder keep (steps of {self.samples}), "
                    f"or effective {self.samples}"
                )

    @cached_property
    def _stages(self) -> list[_Stage]:
        found, place = [], self.start
        for last, effective in self.ramp:
            if last > place.step:
                found.append(self._stage(effective, place))
                place = found[-1].end(last)
        return [*found, self._stage(self.effective, place)]

    def _stage(self, effective: int, start: Place) -> _Stage:
        return _Stage(self.samples, effective, self.remainder, self.limit, start)

    def _of(self, step: int) -> _Stage:
        """The stage of a step."""
        return next(stage for stage in reversed(self._stages) if stage.start.step < step)

    @property
    def _is_regular(self) -> bool:
        """Whether every epoch has the same steps."""
        return not self.ramp and self.start.slot == 0

    @property
    def _has_whole_steps(self) -> bool:
        """Whether every epoch is made of steps of one size, also the one in which another run has ended."""
        return not self.ramp and self.start.slot % self.samples % self.effective == 0

    @property
    def first_step(self) -> int:
        """The first step of this run."""
        return self.start.step + 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch at the last batch size; with `carry`, those that begin in it."""
        return self._stages[-1].steps_per_epoch

    def total_for_epochs(self, epochs: float) -> int:
        """The first step that completes `epochs` epochs, or reaches a part of one."""
        if self._is_regular and self.remainder != "carry":
            return self.start.step + _reached(self.steps_per_epoch, epochs)
        wanted = Fraction(str(epochs))
        return self._first_with(lambda step: self.epochs_done(step) >= wanted, self.start.step)

    def epochs_done(self, step: int) -> Fraction:
        """Epochs that are complete at the end of a step, and the part of the next one.

        A part is one of the steps of an epoch; of its samples with `carry`, and where steps have other sizes.
        """
        slot = self.place(step).slot
        if self.remainder != "carry" and self._has_whole_steps:
            epochs, within = divmod(slot, self.samples)
            return epochs + Fraction(within // self.effective, self.steps_per_epoch)
        if self.remainder == "drop":
            following = self.slots(step + 1)[0]
            slot = following if following % self.samples == 0 else slot
        return Fraction(slot, self.samples)

    def total_for_samples(self, samples: int) -> int:
        """The first step at whose end at least `samples` samples of these data were consumed."""
        if not self._is_regular:
            return self._first_with(
                lambda step: self.place(step).of_these >= samples, self.start.step
            )
        if self.remainder == "carry":
            return self.start.step + -(-samples // self.effective)
        per_epoch = self.samples
        if self.remainder == "drop":
            per_epoch -= self.samples % self.effective
        epochs, rest = divmod(samples, per_epoch)
        return self.start.step + epochs * self.steps_per_epoch + -(-rest // self.effective)

    def slots(self, step: int) -> tuple[int, int]:
        """First slot and end slot (exclusive) of a step; the difference is its number of samples."""
        assert step >= self.first_step, (step, self.first_step)
        return self._of(step).slots(step)

    def effective_at(self, step: int) -> int:
        """The effective batch of a step."""
        return self._of(step).effective

    def epoch(self, step: int) -> int:
        """The epoch, from 1, in which the step begins."""
        return self.slots(step)[0] // self.samples + 1

    def last_step_of_epoch(self, epoch: int) -> int:
        """The last step that begins in the epoch."""
        if self._is_regular:
            if self.remainder == "carry":
                return self.start.step + -(-epoch * self.samples // self.effective)
            return self.start.step + epoch * self.steps_per_epoch
        return self._first_with(lambda step: self.epoch(step) > epoch, self.first_step) - 1

    def consumed(self, step: int) -> int:
        """Samples consumed by the end of a step, without dropped ones, also by the run before this one."""
        return self.place(step).consumed

    def place(self, step: int) -> Place:
        """The place after a step."""
        return self.start if step == self.start.step else self._of(step).end(step)

    def _first_with(self, reached: Callable[[int], bool], low: int) -> int:
        """The first step from `low` on for which a condition holds that then holds for all later ones."""
        high = low + 1
        while not reached(high):
            high = 2 * high
        steps = range(low, high + 1)
        return steps[bisect_left(steps, True, key=reached)]


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
