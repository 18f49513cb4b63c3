"""Writes the prepared rows of one part, column by column; the format is that of `rows.py`."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.rows import DTYPES, array_columns
from drumline.data.tasks import Encoded
from drumline.data.tasks.base import FILE, FILES
from drumline.data.tokenizers import Tokens
from drumline.errors import DataError

_ROWS_AT_ONCE = 1 << 16


class PartWriter:
    """Appends and hashes the samples of one part; keeps none of them in memory."""

    def __init__(self, folder: Path, token_dtype: str | None) -> None:
        folder.mkdir()
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._dtypes = {**DTYPES, "tokens": token_dtype}
        self._ends: dict[str, int] = {}
        self._numbers: dict[bytes, int] = {}
        self.arrays: dict[str, str] = {}
        self.hash = hashlib.sha256()
        self.rows = 0
        self.tokens = 0
        self.label_tokens = 0
        self.longest = 0

    def append_sample(self, sample: Encoded) -> None:
        """Append one sample to every column that it has.

        The order of the columns is part of the fingerprint.
        """
        for sequence in sample.sequences:
            self.append(**self._of_sequence(sequence), **self._arrays_of(sequence))
        columns: dict[str, Any] = {}
        if sample.features is not None:
            columns["features"] = sample.features
        columns |= self._of_sequence(sample)
        if sample.label is not None:
            columns["labels"] = sample.label
        columns |= self._arrays_of(sample)
        self.append(**columns, counts=sample.count)

    def _of_sequence(self, sample: Encoded) -> dict[str, Any]:
        """The columns of a sequence of tokens, if the sample is one."""
        columns: dict[str, Any] = {}
        if sample.tokens is not None:
            columns |= {
                "tokens": sample.tokens,
                "starts": self.tokens,
                "lengths": len(sample.tokens),
            }
            self.tokens += len(sample.tokens)
            last_is_target_only = sample.prompt_targets is not None
            self.longest = max(self.longest, len(sample.tokens) - last_is_target_only)
        if sample.prompt_targets is not None:
            columns["skipped"] = sample.prompt_targets
        return columns

    def _arrays_of(self, sample: Encoded) -> dict[str, Any]:
        """The columns of the task's own arrays."""
        columns: dict[str, Any] = {}
        for name, values in sample.arrays.items():
            self._add_array(columns, name, np.asarray(values))
        if sample.files is not None:
            numbers = [self._number_of(raw) for raw in sample.files]
            self._add_array(columns, FILES, np.array(numbers, dtype=np.int32))
        return columns

    def _number_of(self, raw: bytes) -> int:
        """The number of a file among those of the part, to which it is added where it is new."""
        digest = hashlib.sha256(raw).digest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            columns: dict[str, Any] = {}
            self._add_array(columns, FILE, np.frombuffer(raw, dtype=np.uint8))
            self.append(**columns)
        return self._numbers[digest]

    def append(self, **columns: Any) -> None:
        """Append one value, or an array of values, to each named column."""
        for name, value in columns.items():
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
            raw = np.asarray(value, dtype=self._dtypes[name]).tobytes()
            self._files[name].write(raw)
            self.hash.update(name.encode() + raw)
        if "counts" in columns:
            self.rows += int(np.size(columns["counts"]))
            self.label_tokens += int(np.sum(columns["counts"]))

    def close(self, names: Iterable[str]) -> None:
        """Flush and close the files; columns without a row become empty files."""
        for name in names:
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _add_array(self, columns: dict[str, Any], name: str, values: NDArray[Any]) -> None:
        dtype = values.dtype.newbyteorder("<").str
        if values.ndim != 1 or self.arrays.setdefault(name, dtype) != dtype:
            raise DataError(
                f"data.task_factory: array {name!r}: {dtype} of shape {list(values.shape)}, after rows of "
                f"{self.arrays.get(name)} with one dimension"
            )
        stored, ends = array_columns(name)
        self._dtypes |= {stored: dtype, ends: "<i8"}
        self._ends[name] = self._ends.get(name, 0) + len(values)
        columns |= {stored: values, ends: self._ends[name]}


class Packer:
    """Packs documents end to end into one stream, cut into rows of `length` tokens plus the last target.

    Every token but the first is a target exactly once; the last row may be shorter. `most`: rows at most, or
    None; tokens after them are left over.
    """

    def __init__(self, writer: PartWriter, length: int, most: int | None = None) -> None:
        self._writer, self._length, self._most = writer, length, most
        self._begin = writer.tokens  # of another source's stream before it

    @property
    def is_full(self) -> bool:
        """Whether there are tokens for as many rows as there may be."""
        taken = self._writer.tokens - self._begin
        return self._most is not None and taken > self._most * self._length

    def add(self, tokens: Tokens) -> None:
        """Append a document's tokens."""
        self._writer.append(tokens=tokens)
        self._writer.tokens += len(tokens)

    def finish(self) -> None:
        """Cut the stream into rows."""
        targets = self._writer.tokens - self._begin - 1
        if self._most is not None:
            targets = min(targets, self._most * self._length)
        rows = -(-max(0, targets) // self._length)
        for first in range(0, rows, _ROWS_AT_ONCE):
            places = np.arange(first, min(rows, first + _ROWS_AT_ONCE)) * self._length
            counts = np.minimum(self._length, targets - places)
            starts = self._begin + places
            self._writer.append(
                starts=starts, lengths=counts + 1, skipped=np.zeros_like(counts), counts=counts
            )


class RowCutter:
    """Cuts documents, laid end to end, into rows of `length` tokens, each encoded as a sample of its own.

    The last row may be shorter. `most`: rows at most, or None.
    """

    def __init__(
        self,
        writer: PartWriter,
        length: int,
        most: int | None,
        encode: Callable[[Tokens], Encoded],
    ) -> None:
        self._writer, self._length, self._most, self._encode = writer, length, most, encode
        self._waiting: list[Tokens] = []
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether the part has as many rows as it may."""
        return self._most is not None and self._writer.rows >= self._most

    def add(self, tokens: Tokens) -> None:
        """Append a document's tokens, and write the rows that are full."""
        self._waiting.append(tokens)
        self._count += len(tokens)
        if self._count < self._length:
            return
        whole = np.concatenate(self._waiting)
        end = len(whole) // self._length * self._length
        for start in range(0, end, self._length):
            self._write(whole[start : start + self._length])
        self._waiting, self._count = [whole[end:]], len(whole) - end

    def finish(self) -> None:
        """Write what is left as a row."""
        if self._count:
            self._write(np.concatenate(self._waiting))
            self._waiting, self._count = [], 0

    def _write(self, tokens: Tokens) -> None:
        sample = self._encode(tokens)
        if sample.count and not self.is_full:
            self._writer.append_sample(sample)
