"""The first rows of a recipe's data as the model will see them, for people."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from drumline.data import sources
from drumline.data.files import classes_of
from drumline.data.readers import Reading
from drumline.data.tasks import Encoded, find_task
from drumline.data.tokenizers import Tokenizer, find_tokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import Data


@dataclass(frozen=True)
class ShownRow:
    """One row: where it stands, its pieces of text, each with whether it is trained, and what became of it.

    `tokens` and `trained` count its tokens; `note`: that it was cut or dropped, or what is wrong with it.
    """

    where: str
    pieces: list[tuple[str, bool]]
    tokens: int
    trained: int
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """What the rows were recognised as, and the first of them."""

    style: str
    rows: Iterator[ShownRow]


def show(data: Data, project: str | None, count: int) -> Shown:
    """The first `count` rows of each source; DataError where one has none, or its style is not known."""
    found = {label: _of_source(own, project, count) for label, own in data.sources().items()}
    styles = dict.fromkeys(style for style, _ in found.values())

    def shown() -> Iterator[ShownRow]:
        for label, (_, rows) in found.items():
            for row in rows:
                yield replace(row, where=f"{label}: {row.where}") if label else row

    return Shown(", ".join(styles), shown())


def _of_source(data: Data, project: str | None, count: int) -> tuple[str, Iterator[ShownRow]]:
    """What the rows of one source were recognised as, and the first of them."""
    task, rows = find_task(data, project), sources.read(data, project, Reading(0))
    first = next(rows, None)
    if first is None:
        raise DataError("data: the source has no rows")
    task.class_names = data.label_names or classes_of(data)
    task.begin(first.fields)
    tokenizer = None
    if task.needs_tokenizer:
        tokenizer = find_tokenizer(
            data.tokenizer, data.bos, task.needs_end, data.special_tokens_in_text
        )
        task.use(tokenizer)

    def shown() -> Iterator[ShownRow]:
        for row in itertools.islice(itertools.chain([first], rows), count):
            try:
                if row.problem:
                    raise DataError(row.problem)
                yield _row(row.where, task.encode(row.fields, tokenizer), tokenizer)
            except DataError as error:
                yield ShownRow(row.where, [], 0, 0, f"bad: {error}")

    return task.style or data.task, shown()


def _row(where: str, sample: Encoded | None, tokenizer: Tokenizer | None) -> ShownRow:
    if sample is None or sample.count <= 0:
        return ShownRow(
            where, [], 0, 0, "dropped: nothing that is trained fits into sequence_length"
        )
    note = "cut at sequence_length" if sample.was_truncated else ""
    if sample.sequences:
        rows = [_row(where, one, tokenizer) for one in sample.sequences]
        pieces = [piece for row in rows for piece in (*row.pieces, ("\n", False))][:-1]
        if sample.label is not None:
            pieces.append((" (desirable)" if sample.label else " (not desirable)", False))
        return ShownRow(
            where, pieces, sum(r.tokens for r in rows), sum(r.trained for r in rows), note
        )
    if sample.tokens is None or tokenizer is None:
        kept = f"class {sample.label}" if sample.label is not None else "no tokens"
        return ShownRow(where, [(kept, True)], 0, sample.count, note)
    trained = _trained(sample)
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    pieces = [
        (tokenizer.decode(sample.tokens[start:end]), bool(trained[start]))
        for start, end in itertools.pairwise(edges)
    ]
    if sample.label is not None:
        pieces.append((f"class {sample.label}", True))
    return ShownRow(where, pieces, len(sample.tokens), sample.count, note)


def _trained(sample: Encoded) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Which tokens are targets of the loss, bool [n]."""
    assert sample.tokens is not None
    found = np.zeros(len(sample.tokens), dtype=bool)
    if sample.label is not None:
        return found
    turns = sample.arrays.get("turns")
    if turns is not None:
        for start, end in turns.reshape(-1, 2):
            found[start:end] = True
    else:
        found[(sample.prompt_targets or 0) + 1 :] = True
    return found
