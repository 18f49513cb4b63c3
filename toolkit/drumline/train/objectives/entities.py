"""F1 of entities, such as names of persons, whose words have labels such as B-PER and I-PER."""

from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.data.tasks.base import IGNORED

Entity = tuple[str, int, int]
"""The kind of an entity, its first word, and the word after its last one."""


_FIRST, _LATER, _ENDS = ("B", "S", "U"), ("I", "E", "L"), ("E", "L", "S", "U")
"""Marks of BIO, BIOES and BILOU: of words that begin an entity, of the others, of its last word."""


def entity_f1(said: Tensor, targets: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """2 × entities that are right, and entities said + entities there are: their ratio over all rows is F1.

    `said` and `targets`: classes, int64 [n, L]; a word stands where its target is not ignored. An entity is
    right if its kind and both ends are, as CoNLL counts them.
    """
    right = found = 0
    for guess, truth in zip(said.tolist(), targets.tolist(), strict=True):
        words = [(a, b) for a, b in zip(guess, truth, strict=True) if b != IGNORED]
        ours, theirs = (
            set(entities([names[word[side]] if word[side] < len(names) else "O" for word in words]))
            for side in (0, 1)
        )
        right += len(ours & theirs)
        found += len(ours) + len(theirs)
    device = said.device
    return torch.tensor(2 * right, device=device), torch.tensor(found, device=device)


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of a row's labels. An I- that continues nothing of its kind begins one."""
    found: list[Entity] = []
    kind, first = "", 0
    for place, label in enumerate([*labels, "O"]):
        mark, _, own = label.partition("-")
        goes_on = mark in _LATER and own == kind
        if kind and not goes_on:
            found.append((kind, first, place))
            kind = ""
        if not goes_on and mark in (*_FIRST, *_LATER) and own:
            kind, first = own, place
        if kind and mark in _ENDS:
            found.append((kind, first, place + 1))
            kind = ""
    return found
