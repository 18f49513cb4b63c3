"""What a task is to the rest of the code: rows in, samples out, samples as arrays of a micro-batch."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tokenizers import Tokenizer, Tokens
from drumline.errors import DataError, PlanError
from drumline.recipe.schema import Data

IGNORED = -100
"""A target that does not count, as torch's cross_entropy has it."""

Arrays = dict[str, NDArray[Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One sample as it is stored.

    `tokens`: uint32 [n]. `prompt_targets`: how many leading targets do not count. `label`: a class from 0.
    `features`: float32 of one shape for all samples. `arrays`: whatever else the task stores, by name, each
    of one dimension and any length. `count`: what the sample weighs under `weighting: token`, its label
    tokens.
    """

    count: int
    tokens: Tokens | None = None
    prompt_targets: int | None = None
    label: int | None = None
    features: NDArray[np.float32] | None = None
    arrays: Arrays = field(default_factory=dict)
    was_truncated: bool = False


class StoredRows(Protocol):
    """What a task reads samples from (`data/rows.py`)."""

    manifest: DatasetManifest

    def tokens(
        self, indices: NDArray[np.int64], width: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [n, width] (default: the longest row's) and which of them belong to the row."""

    def column(self, name: str) -> NDArray[Any]:
        """A stored column of one value (or one array of fixed shape) a row."""

    def array(self, name: str, indices: NDArray[np.int64]) -> list[NDArray[Any]]:
        """What `Encoded.arrays` held under this name, of each of these rows."""


class Task:
    """One way in which rows become samples. Subclasses give `encode` and `collate`.

    `is_stream`: documents are joined end to end and cut into rows of `sequence_length` tokens; `encode` then
    returns a piece of a document. `columns`: the stored columns, also where there is no row.
    """

    is_stream = False
    needs_tokenizer = True
    columns: tuple[str, ...] = ("counts",)
    data: Data

    def __init__(self, data: Data | None = None) -> None:
        if data is not None:
            self.data = data

    def begin(self, first: Row) -> None:
        """Look at the first row, for a task that must see one to know what it stores."""

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """A row as a sample; None where nothing of it would be learnt. DataError where it is wrong."""
        raise NotImplementedError

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """Samples as the arrays of one micro-batch.

        The model's inputs by the names of its arguments (or `features`, passed as the first one), and
        `targets`, -100 where they do not count.
        """
        raise NotImplementedError

    def widen(self, arrays: Arrays) -> Arrays:
        """The same arrays at the largest shape that a micro-batch of as many rows can have."""
        length = self.data.sequence_length
        if not length or "input_ids" not in arrays:
            return arrays
        return {name: _padded(v, length) if v.ndim == 2 else v for name, v in arrays.items()}

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """A micro-batch of `count` samples at the largest shape, all zero, without prepared data.

        PlanError where the shape is not known.
        """
        raise PlanError(
            f"--trace: what a sample of task {self.data.task} looks like is known to its own code only. "
            "Nearest: `drumline run` with a short duration"
        )


def text_field(row: Row, name: str, key: str) -> str:
    """The text of a column; DataError names the recipe's key and the columns that there are."""
    value = row.get(name)
    if not isinstance(value, str):
        columns = ", ".join(str(column) for column in row if column != "ends")
        found = f"a {type(value).__name__}" if name in row else f"this row has: {columns}"
        raise DataError(f"data.{key}: no text in column {name!r}; {found}")
    return value


def language_rows(rows: StoredRows, indices: NDArray[np.int64], width: int | None) -> Arrays:
    """input_ids and targets, int64 [n, L]: each token's target is the next one, or -100."""
    tokens, inside = rows.tokens(indices, width and width + 1)
    place = np.arange(tokens.shape[1] - 1)
    counted = inside[:, 1:] & (place >= rows.column("skipped")[indices][:, None])
    targets = np.where(counted, tokens[:, 1:], IGNORED)
    return {"input_ids": np.where(inside[:, 1:], tokens[:, :-1], 0), "targets": targets}


def blank_language_rows(count: int, length: int | None) -> Arrays:
    """`language_rows` of `count` samples of `length` tokens, all zero."""
    assert length
    zeros = np.zeros((count, length), dtype=np.int64)
    return {"input_ids": zeros, "targets": zeros.copy()}


def _padded(values: NDArray[Any], length: int) -> NDArray[Any]:
    if values.shape[1] >= length:
        return values
    return np.pad(values, ((0, 0), (0, length - values.shape[1])))
