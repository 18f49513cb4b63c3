"""Writes a source's rows as samples: cut from a stream, one by one, or as documents side by side in rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from drumline.data.document_packer import DocumentPacker
from drumline.data.part_writer import Packer, PartWriter, RowCutter
from drumline.data.source_row import SourceRow
from drumline.data.tasks import Encoded, Task
from drumline.data.tokenizers import Tokenizer, Tokens
from drumline.data.validation_split import TRAIN, Placed, split_of
from drumline.errors import DataError, OfAllRows
from drumline.recipe.data_section import Data

_FEW_BAD_ROWS = 10
_MOST_BAD_ROWS = 0.01
"""With `on_bad_row: skip`, more bad rows than both are refused."""


@dataclass
class Seen:
    """Counts and shapes found while writing the rows."""

    documents: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    first_problem: str = ""
    rows: int = 0
    is_stream: bool = False
    classes: int = 0
    feature_shape: list[int] | None = None

    def skip(self, problem: str) -> None:
        """Count a bad row; DataError where they are more than a few."""
        self.skipped += 1
        self.first_problem = self.first_problem or problem
        if self.skipped > max(_FEW_BAD_ROWS, self.rows * _MOST_BAD_ROWS):
            raise DataError(
                f"data.on_bad_row: {self.skipped:,} of {self.rows:,} rows are bad, which is more than "
                f"{_MOST_BAD_ROWS:.0%}. The first: {self.first_problem}"
            )

    def add(self, other: "Seen") -> None:
        """Add the counts of another source."""
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.skipped += other.skipped
        self.first_problem = self.first_problem or other.first_problem

    def join(self, other: "Seen") -> None:
        """Add all that was seen of another source that is trained."""
        self.add(other)
        self.documents += other.documents
        self.classes = max(self.classes, other.classes)
        self.feature_shape = self.feature_shape or other.feature_shape

    def note(self, sample: Encoded) -> None:
        """Count a sample; DataError where its features have another shape than earlier ones."""
        self.truncated += sample.was_truncated
        if sample.label is not None:
            self.classes = max(self.classes, sample.label + 1)
        if sample.outputs is not None:
            self.classes = max(self.classes, sample.outputs)
        if sample.features is not None:
            shape = list(sample.features.shape)
            self.feature_shape = self.feature_shape or shape
            if shape != self.feature_shape:
                raise DataError(f"features of shape {shape}, after rows of {self.feature_shape}")


Writers = dict[str, PartWriter]
Show = Callable[[int, int], None]


def write_stream(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    seen: Seen,
    show: Show,
) -> None:
    """Pack documents into rows, each with the begin token, if there is one, and the end token.

    A document may span several source rows.
    """
    assert tokenizer
    seen.is_stream = True
    begin, end = (
        np.array([] if token is None else [token], dtype=np.uint32)
        for token in task.around(tokenizer)
    )
    begins = True
    length = task.data.sequence_length
    assert length
    split, written, most = split_of(task.data), 0, _most(task.data)
    packers: dict[str, Packer | RowCutter] = {}
    for part, writer in writers.items():
        rows_at_most = most if part == TRAIN else None
        packers[part] = (
            RowCutter(writer, length, rows_at_most, task.cut)
            if task.counts_each_row
            else Packer(writer, length, rows_at_most)
        )
    for row in rows:
        piece = _encoded(task, row, tokenizer, seen)
        if piece is None or piece.tokens is None:
            continue
        parts = [begin] * begins + [piece.tokens] + [end] * row.ends
        filled = [part for part in parts if part.size] or [piece.tokens]
        tokens = filled[0] if len(filled) == 1 else np.concatenate(filled)  # a block is large
        begins = row.ends
        packers[split.part_of(seen.documents)].add(tokens)
        seen.documents += row.ends
        written += len(tokens)
        show(seen.documents, written)
        if packers[TRAIN].is_full:
            seen.documents += not row.ends  # the rest of it is not read
            break
    for packer in packers.values():
        packer.finish()


def _most(data: Data) -> int | None:
    """Training rows after which reading stops; None where recorded runs have always read all rows."""
    return None if data.validation_split == "periodic" else data.samples


def write_samples(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    seen: Seen,
    show: Show,
) -> None:
    """Write one sample per source row; rows without a target are dropped and counted."""
    split, most = split_of(task.data), _most(task.data)

    def append(placed: Placed) -> None:
        for part, sample in placed:
            if part != TRAIN or writers[part].rows != most:
                writers[part].append_sample(sample)

    for row in rows:
        skipped = seen.skipped
        sample = _encoded(task, row, tokenizer, seen)
        if seen.skipped > skipped:
            continue
        if sample is None or sample.count <= 0:
            seen.dropped += 1
        else:
            append(split.place(seen.documents, sample))
        seen.documents += 1
        show(seen.documents, seen.documents)
        if writers[TRAIN].rows == most:
            return
    append(split.finish())


def write_documents(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    seen: Seen,
    show: Show,
) -> None:
    """Pack whole documents into rows; those of a stream that are longer than a row in pieces.

    A document of a stream may span several source rows.
    """
    assert tokenizer and tokenizer.end is not None
    length = task.data.sequence_length
    assert length
    split, most, written = split_of(task.data), _most(task.data), 0
    packers = {
        part: DocumentPacker(writer, length, most if part == TRAIN else None)
        for part, writer in writers.items()
    }
    waiting: list[Tokens] = [_begin(tokenizer)]
    for row in rows:
        skipped = seen.skipped
        sample = _encoded(task, row, tokenizer, seen)
        if task.is_stream:
            if sample is not None and sample.tokens is not None:
                waiting.append(sample.tokens)
            if not row.ends:
                continue
            whole = np.append(np.concatenate(waiting), np.uint32(tokenizer.end))
            waiting = [_begin(tokenizer)]
            part = split.part_of(seen.documents)
            for piece in _pieces(whole, length):
                packers[part].add(piece)
            written += len(whole)
        elif seen.skipped > skipped:
            continue
        elif sample is None or sample.count <= 0:
            seen.dropped += 1
        else:
            for part, one in split.place(seen.documents, sample):
                packers[part].add(one)
        seen.documents += 1
        show(seen.documents, written or seen.documents)
        if packers[TRAIN].is_full:
            break
    for part, one in split.finish():
        packers[part].add(one)
    for packer in packers.values():
        packer.finish()


def _begin(tokenizer: Tokenizer) -> Tokens:
    """The begin token, if texts have one."""
    return np.array([] if tokenizer.begin is None else [tokenizer.begin], dtype=np.uint32)


def _pieces(tokens: Tokens, length: int) -> Iterator[Encoded]:
    """A document as samples of at most `length` targets; each begins with the last token of the one before.

    So every token but the first is a target once.
    """
    for start in range(0, len(tokens) - 1, length):
        piece = tokens[start : start + length + 1]
        yield Encoded(count=len(piece) - 1, tokens=piece, prompt_targets=0)


def _encoded(task: Task, row: SourceRow, tokenizer: Tokenizer | None, seen: Seen) -> Encoded | None:
    """The sample of a row, counted in `seen`.

    A bad row is skipped and counted where `data.on_bad_row` says so; else a DataError says where it stands.
    """
    seen.rows += 1
    try:
        if row.problem:
            raise DataError(row.problem)
        sample = task.encode(row.fields, tokenizer)
        if sample is not None:
            seen.note(sample)
    except DataError as error:
        problem = f"{row.where}: {error}"
        if task.data.on_bad_row == "stop" or isinstance(error, OfAllRows):
            raise DataError(f"data: {problem}") from None
        seen.skip(problem)
        return None
    return sample
