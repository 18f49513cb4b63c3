"""The interface of all tasks: encode a row as a sample, collate samples into micro-batch arrays."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest, MaskFacts
from drumline.data.tokenizers import Request, Tokenizer, Tokens
from drumline.errors import DataError, PlanError
from drumline.recipe.data_section import Data

IGNORED = -100
"""Target value of the loss mask: ignored, as by default in torch's cross_entropy."""

TURNS = "turns"
"""The array of a row with the first token and end of every piece that is trained, one after the other."""
SEGMENTS = "segments"
"""The array of a row with the first token of every document in it."""
FILE, FILES = "file", "files"
"""The arrays of a part's distinct files, and of the numbers of a row's files among them."""

REFERENCE = "reference"
"""The log-probabilities of the reference model, which are added to prepared rows in memory."""
BASELINE = "baseline_"
"""Prefix of the inputs and targets of mismatched completions."""
WEIGHTS = "weights"
"""The weight of each counted token of a row, which the reader adds to every micro-batch."""
NOT_INPUTS = {
    "targets",
    WEIGHTS,
    "sources",
    "lengths",
    REFERENCE,
    "desirable",
    BASELINE + "input_ids",
    BASELINE + "targets",
}
"""Tensors of a micro-batch that the model is not given."""

Arrays = dict[str, NDArray[Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One sample as it is stored.

    `tokens`: uint32 [n]. `prompt_targets`: number of leading targets to ignore. `label`: a class from 0.
    `outputs`: how many outputs of the head the labels need, where they are no class. `features`: float32,
    the same shape for all samples. `arrays`: other arrays of the task by name, each of one dimension and any
    length. `files`: of its images, each stored once in a part whatever number of samples have it; None where
    samples have none. `sequences`: of tokens, each a sample of its own, where a row holds several instead of
    `tokens`. `count`: label tokens, the sample's weight under `weighting: token`.
    """

    count: int
    tokens: Tokens | None = None
    prompt_targets: int | None = None
    label: int | None = None
    outputs: int | None = None
    features: NDArray[np.float32] | None = None
    arrays: Arrays = field(default_factory=dict)
    files: tuple[bytes, ...] | None = None
    sequences: "tuple[Encoded, ...]" = ()
    was_truncated: bool = False


def refuse_own_weights(arrays: Arrays) -> None:
    """DataError for an array of the project's that the reader would replace."""
    if WEIGHTS in arrays:
        raise DataError(
            f"data: {WEIGHTS!r} is the name of what each row counts in a batch. Nearest: another name"
        )


class StoredRows(Protocol):
    """The stored rows that a task collates (`data/rows.py`)."""

    manifest: DatasetManifest
    part: str

    def tokens(
        self, indices: NDArray[np.int64], width: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [n, width] (default: longest row) and a mask [n, width], false for padding."""

    def column(self, name: str) -> NDArray[Any]:
        """A stored column with one value (or one array of fixed shape) per row, or per sequence of it."""

    def attached(self, name: str) -> NDArray[Any] | None:
        """A column that was added in memory, if it was."""

    def array(self, name: str, indices: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The array that `Encoded.arrays` had under this name, for each of these rows."""


class Task:
    """Turns rows into samples. Subclasses implement `encode` and `collate`.

    `needs_end`: documents or completions end with the tokenizer's end token. `is_stream`: documents are
    packed end to end and cut into rows of `sequence_length` tokens; `encode` then returns a block of a
    document. `has_fixed_outputs`: every row has labels for as many outputs of the head. `columns`: the
    columns to store, also for a part without rows. `sequences`: of tokens that a row holds, and which have a
    length each. `fewest_rows`: that a part must have. `draws`: samples are made with random choices while
    they are read (`collate_drawn` instead of `collate`). `counts_each_row`: rows of a stream are encoded by
    `cut`. `feature_shape`: of samples that are made while they are read. `class_names`: of classes that rows
    name by texts. `project`: the folder of the recipe's own code. `masking`: the tokens that a task which
    masks some needs to know of. `is_traced_by_a_row`: the shapes of a micro-batch follow from prepared rows
    only, so a trace takes the largest instead of `blank`.
    """

    is_stream = False
    has_fixed_outputs = False
    needs_tokenizer = True
    needs_end = True
    columns: tuple[str, ...] = ("counts",)
    sequences = 1
    fewest_rows = 1
    draws = False
    counts_each_row = False
    is_traced_by_a_row = False
    masking: MaskFacts | None = None
    feature_shape: list[int] | None = None
    class_names: list[str] | None = None
    project: str | None = None
    data: Data

    def __init__(self, data: Data | None = None) -> None:
        if data is not None:
            self.data = data

    def requests(self, row: Row) -> list[Request]:
        """What `encode` will ask the tokenizer for this row, so that many rows can be tokenised together.

        The default asks for nothing, which is always right: the tokenizer then answers when it is called.
        """
        return []

    style = ""
    """What the rows were recognised as, to be told, if there are several styles."""
    is_chat = False
    """Whether the rows are chats, which a template turns into text."""

    def begin(self, first: Row) -> None:
        """Inspect the first row, for a task whose stored columns depend on it."""

    def use(self, tokenizer: Tokenizer) -> None:
        """Take what the task needs of the tokenizer before the first row is encoded."""

    def around(self, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
        """The tokens before and after each document of a stream."""
        return tokenizer.begin, tokenizer.end

    def cut(self, tokens: Tokens) -> Encoded:
        """A row that was cut from a stream as a sample; `count` 0 drops it."""
        raise NotImplementedError

    def check(self) -> None:
        """Look back on all rows of a source, after the last one; DataError where nothing could be learnt."""

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Encode a row as a sample; None (or `count` 0) drops it. DataError for an invalid row."""
        raise NotImplementedError

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """Collate samples into the arrays of one micro-batch.

        They are the model's inputs by argument name (or `features`, passed as the first argument), and
        `targets`, -100 where ignored.
        """
        raise NotImplementedError

    def collate_drawn(
        self, rows: StoredRows, indices: NDArray[np.int64], seeds: NDArray[np.uint64]
    ) -> Arrays:
        """`collate` of a task that `draws`: every random choice of a sample must follow from its seed alone.

        It then depends on the recipe's seed, the epoch and the sample, not on the split, workers or resume.
        """
        raise NotImplementedError

    def companion(self, rows: StoredRows, indices: NDArray[np.int64]) -> int | None:
        """A row that a micro-batch of these needs beside them, with all targets ignored; None without one.

        Of a model that reads images, every forward on every rank must use the same weights.
        """
        return None

    def largest(self, rows: StoredRows, count: int) -> NDArray[np.int64]:
        """Rows that make the largest micro-batch of so many, once `widen` has padded them."""
        return np.zeros(count, dtype=np.int64)

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad the arrays to the largest shape of a micro-batch with this number of rows."""
        length = manifest.row_tokens
        if not length or "input_ids" not in arrays:
            return arrays
        return {name: _padded(v, length) if v.ndim == 2 else v for name, v in arrays.items()}

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """An all-zero micro-batch of `count` samples of the largest shape, without prepared data.

        PlanError where the shape is not known.
        """
        raise PlanError(
            f"--trace: what a sample of task {self.data.task} looks like is known to its own code only. "
            "Nearest: `drumline run` with a short duration"
        )


def text_field(row: Row, name: str, key: str) -> str:
    """The text in a column; DataError names the recipe's key and the row's columns."""
    is_there, value = field_of(row, name)
    if isinstance(value, str):
        return value
    if not is_there:
        found = f"this row has: {', '.join(map(str, row)) or 'no columns'}"
    else:
        found = "it is null" if value is None else f"it holds {type(value).__name__} {value!r:.60}"
    raise DataError(f"data.{key}: no text in column {name!r}; {found}")


def field_of(row: Row, name: str) -> tuple[bool, Any]:
    """Whether a row has this field, and its value; `a.b` is b of a, unless a column has that name."""
    if name in row:
        return True, row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def language_rows(rows: StoredRows, indices: NDArray[np.int64], width: int | None) -> Arrays:
    """input_ids and targets, int64 [n, L]: each token's target is the next token, or -100 if ignored.

    Rows of several documents also have position_ids, int64 [n, L], which begin at 0 with every document and
    with the padding.
    """
    tokens, inside = rows.tokens(indices, width and width + 1)
    length = tokens.shape[1] - 1
    counted = inside[:, 1:] & (np.arange(length) >= rows.column("skipped")[indices][:, None])
    arrays = rows.manifest.arrays
    if TURNS in arrays:
        for number, edges in enumerate(rows.array(TURNS, indices)):
            counted[number] &= trained_targets(edges, length)
    found = {
        "input_ids": np.where(inside[:, 1:], tokens[:, :-1], 0),
        "targets": np.where(counted, tokens[:, 1:], IGNORED),
    }
    if SEGMENTS in arrays:
        starts = rows.array(SEGMENTS, indices)
        sizes = rows.column("lengths")[indices] - 1
        found["position_ids"] = np.stack(
            [positions(own, size, length) for own, size in zip(starts, sizes, strict=True)]
        )
    return found


def trained_targets(edges: NDArray[Any], length: int) -> NDArray[np.bool_]:
    """Which of `length` targets are trained, bool [length]; `edges`: of the trained tokens."""
    marks = np.zeros(length + 2, dtype=np.int8)
    np.add.at(marks, np.minimum(edges[0::2], length + 1), 1)
    np.add.at(marks, np.minimum(edges[1::2], length + 1), -1)
    return np.asarray(np.cumsum(marks)[1 : length + 1] > 0)


def positions(starts: NDArray[Any], size: int, length: int) -> NDArray[np.int64]:
    """Positions of `length` inputs, of which the first `size` are of documents that begin at `starts`."""
    begins = np.zeros(length, dtype=np.int64)
    for start in (*starts.tolist(), size):
        begins[start:] = start
    return np.arange(length) - begins


def blank_language_rows(count: int, length: int | None, has_documents: bool = False) -> Arrays:
    """`language_rows` of `count` samples of `length` tokens, all zero."""
    assert length
    zeros = np.zeros((count, length), dtype=np.int64)
    more = {"position_ids": np.tile(np.arange(length), (count, 1))} if has_documents else {}
    return {"input_ids": zeros, "targets": zeros.copy(), **more}


def _padded(values: NDArray[Any], length: int) -> NDArray[Any]:
    if values.shape[1] >= length:
        return values
    return np.pad(values, ((0, 0), (0, length - values.shape[1])))
