"""Packs whole documents into rows of at most `sequence_length` inputs: best fit among a window of open rows.

What is packed depends on the order of the documents alone, so it is the same on every machine and at any
split.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drumline.data.part_writer import PartWriter
from drumline.data.tasks.base import SEGMENTS, TURNS, Encoded

_OPEN_ROWS = 128
"""Rows that a document may still go into; the fullest is closed when there are more."""


@dataclass(eq=False)
class _Open:
    """A row that is not full: its documents, and how many tokens they have."""

    documents: list[Encoded] = field(default_factory=list)
    tokens: int = 0


class DocumentPacker:
    """Writes rows of documents to a part; `most`: rows at most, or None."""

    def __init__(self, writer: PartWriter, length: int, most: int | None = None) -> None:
        self._writer, self._most_tokens, self._most = writer, length + 1, most
        self._rows: list[_Open] = []

    @property
    def is_full(self) -> bool:
        """Whether the part has as many rows as it may."""
        return self._most is not None and self._writer.rows >= self._most

    def add(self, sample: Encoded) -> None:
        """Put a document of at most `length` + 1 tokens into the open row that it fills most."""
        assert sample.tokens is not None
        size = len(sample.tokens)
        assert size <= self._most_tokens
        fitting = [row for row in self._rows if row.tokens + size <= self._most_tokens]
        row = max(fitting, key=lambda row: row.tokens, default=None)
        if row is None:
            row = _Open()
            self._rows.append(row)
        row.documents.append(sample)
        row.tokens += size
        if row.tokens == self._most_tokens:
            self._close(row)
        elif len(self._rows) > _OPEN_ROWS:
            self._close(max(self._rows, key=lambda row: row.tokens))

    def finish(self) -> None:
        """Close all rows, the oldest first."""
        for row in list(self._rows):
            self._close(row)

    def _close(self, row: _Open) -> None:
        self._rows.remove(row)
        if not self.is_full:
            self._writer.append_sample(_joined(row.documents))


def trained_edges(sample: Encoded) -> NDArray[np.int32]:
    """First token and end of every piece of a document that is trained."""
    assert sample.tokens is not None
    if TURNS in sample.arrays:
        return np.asarray(sample.arrays[TURNS], np.int32)
    return np.array([(sample.prompt_targets or 0) + 1, len(sample.tokens)], np.int32)


def _joined(documents: list[Encoded]) -> Encoded:
    """One row: the tokens of all documents, what is trained of each, and where each begins."""
    tokens = [np.asarray(one.tokens) for one in documents]
    starts = np.cumsum([0, *(len(one) for one in tokens[:-1])], dtype=np.int32)
    edges = [trained_edges(one) + start for one, start in zip(documents, starts, strict=True)]
    turns = np.concatenate(edges).astype(np.int32)
    return Encoded(
        count=sum(one.count for one in documents),
        tokens=np.concatenate(tokens).astype(np.uint32),
        prompt_targets=int(turns[0]) - 1,
        arrays={TURNS: turns, SEGMENTS: starts},
    )
