"""Decides which samples are for validation: a seeded draw, stratified by class where samples have one.

Of every 1 / share samples in a row one is drawn, so that the share is exact, no order of the rows can meet a
period of the draw, and rows can be written as they are read. Nothing depends on the batch or its split.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from drumline.data.tasks import Encoded
from drumline.recipe.data_section import Data

TRAIN, VALIDATION = "train", "validation"

Placed = Iterator[tuple[str, Encoded]]


class Periodic:
    """Of the first n documents floor(n × share) are for validation, at equal distances."""

    def __init__(self, share: Fraction) -> None:
        self._share = share

    def part_of(self, document: int) -> str:
        """The part of a document, counted from 0."""
        window = int(document * self._share)
        return VALIDATION if int((document + 1) * self._share) > window else TRAIN

    def place(self, document: int, sample: Encoded) -> Placed:
        """The samples whose part is known now, in order; `document` counts those without a target too."""
        yield self.part_of(document), sample

    def finish(self) -> Placed:
        """The samples that are still held back."""
        return iter(())


class Drawn(Periodic):
    """One document is drawn of each window of 1 / share."""

    def __init__(self, share: Fraction, seed: int) -> None:
        super().__init__(share)
        self._seed, self._placed = seed, 0

    def part_of(self, document: int) -> str:
        """The part of a document, counted from 0."""
        if not self._share:
            return TRAIN
        window = int(document * self._share)
        start, stop = self._bounds(window)
        drawn = start + _number(self._seed, window) % (stop - start)
        return VALIDATION if document == drawn else TRAIN

    def place(self, document: int, sample: Encoded) -> Placed:
        """The samples whose part is known now, in order; only these are counted."""
        yield self.part_of(self._placed), sample
        self._placed += 1

    def _bounds(self, window: int) -> tuple[int, int]:
        """The first document of a window, and of the next one."""
        return math.ceil(window / self._share), math.ceil((window + 1) / self._share)


class Stratified(Drawn):
    """Of each window a sample of the class that lacks most: every class has its share, to one sample.

    Holds back the samples of one window.
    """

    def __init__(self, share: Fraction, seed: int) -> None:
        super().__init__(share, seed)
        self._held: list[Encoded] = []
        self._seen: Counter[int | None] = Counter()
        self._drawn: Counter[int | None] = Counter()
        self._window = 0

    def place(self, document: int, sample: Encoded) -> Placed:
        """All samples of a window, when its last one is there."""
        self._held.append(sample)
        self._seen[sample.label] += 1
        start, stop = self._bounds(self._window)
        if len(self._held) == stop - start:
            chosen = self._choose()
            self._window += 1
            yield from self._let_go(chosen)

    def finish(self) -> Placed:
        """The samples of the last window, which is not full: none is drawn of it."""
        yield from self._let_go(None)

    def _choose(self) -> int:
        """The place of the drawn sample among those that are held back."""
        classes = sorted({sample.label for sample in self._held}, key=str)
        lacks = {c: self._seen[c] * self._share - self._drawn[c] for c in classes}
        most = [c for c in classes if lacks[c] == max(lacks.values())]
        one = most[_number(self._seed, self._window, "class") % len(most)]
        self._drawn[one] += 1
        places = [n for n, sample in enumerate(self._held) if sample.label == one]
        return places[_number(self._seed, self._window) % len(places)]

    def _let_go(self, chosen: int | None) -> Placed:
        held, self._held = self._held, []
        for number, sample in enumerate(held):
            yield VALIDATION if number == chosen else TRAIN, sample


def split_of(data: Data) -> Periodic:
    """How a recipe's data are split."""
    share = Fraction(str(data.validation))
    if data.validation_split == "periodic":
        return Periodic(share)
    if share and data.task == "classification":
        return Stratified(share, data.validation_seed)
    return Drawn(share, data.validation_seed)


def _number(seed: int, *what: object) -> int:
    """A number below 2^64 that looks random, the same on every machine."""
    words = ":".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")
