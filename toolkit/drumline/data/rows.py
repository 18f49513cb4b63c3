"""Memory-mapped random access to the prepared rows that `prepare` has written.

A folder has `card.json` and, for `train` and `validation`, raw little-endian arrays:

    tokens   uint16/uint32   all tokens of all rows          starts  int64 [N]   first token of a row
    lengths  int32 [N]       tokens of a row                 skipped int32 [N]   leading targets ignored,
    counts   int32 [N]       label tokens of a row                               those of the prompt
    features float32 [N, …]  labels int64 [N]                (classification)
    array-X  any             all values of array X           ends-X  int64 [N]   where a row's values end

Where a row holds several sequences of tokens, starts, lengths, skipped and ends-X have one value for each.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest, read_dataset_manifest
from drumline.data.tasks.base import Arrays, Task
from drumline.errors import DataError

DTYPES = {
    "starts": "<i8",
    "lengths": "<i4",
    "skipped": "<i4",
    "counts": "<i4",
    "labels": "<i8",
    "features": "<f4",
}


def array_columns(name: str) -> tuple[str, str]:
    """The two columns of a task's own array: its values, and the index at which each row's values end."""
    return f"array-{name}", f"ends-{name}"


def lengths_of(folder: Path, part: str, sequences: int) -> NDArray[np.int32]:
    """Tokens of each prepared row of a part, of the longest of its sequences, int32 [N]."""
    found = _mapped(folder / part / "lengths.bin", DTYPES["lengths"])
    return found if sequences == 1 else found.reshape(-1, sequences).max(axis=1)


class Rows:
    """The samples of one part (`train` or `validation`), memory-mapped.

    `counts`: int32 [N], the label tokens of each sample. `added`: columns in memory, by name. `keeps_masks`:
    an attention_mask of ones is given to the model, too, since code of the project may read it.
    """

    def __init__(self, folder: Path, part: str, task: Task, *, keeps_masks: bool = False) -> None:
        manifest = read_dataset_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder}: no prepared data; run `drumline prepare`")
        self.manifest: DatasetManifest = manifest
        self.task, self.part, self.keeps_masks = task, part, keeps_masks
        self._folder = folder / part
        self._columns: dict[str, NDArray[Any]] = {}
        self.added: dict[str, NDArray[Any]] = {}
        self.counts = self.column("counts")

    def __len__(self) -> int:
        return len(self.counts)

    def collate(
        self, indices: NDArray[np.int64], seeds: NDArray[np.uint64] | None = None
    ) -> Arrays:
        """Samples as the arrays of one micro-batch, collated by their task; `seeds`: for what it draws."""
        if not self.task.draws:
            return self.task.collate(self, indices)
        assert seeds is not None
        return self.task.collate_drawn(self, indices, seeds)

    def tokens(
        self, indices: NDArray[np.int64], width: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [n, width] (default: longest row) and a mask [n, width], false for padding."""
        lengths = self.column("lengths")[indices]
        place = np.arange(width or int(lengths.max()))
        inside = place < lengths[:, None]
        where = np.where(inside, self.column("starts")[indices][:, None] + place, 0)
        return self.column("tokens")[where].astype(np.int64), inside

    def array(self, name: str, indices: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The values of a task's own array, one array per row."""
        values, ends = (self.column(column) for column in array_columns(name))
        firsts = np.where(indices > 0, ends[indices - 1], 0)
        return [
            np.asarray(values[first:end]) for first, end in zip(firsts, ends[indices], strict=True)
        ]

    def column(self, name: str) -> NDArray[Any]:
        """A memory-mapped column; DataError where it is missing."""
        if name not in self._columns:
            self._columns[name] = self._map(name)
        return self._columns[name]

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, of the longest of its sequences, int32 [N]."""
        return lengths_of(self._folder.parent, self._folder.name, self.manifest.sequences)

    def attach(self, name: str, values: NDArray[Any]) -> None:
        """Add a column in memory, with one value or array per row."""
        assert len(values) == len(self)
        self.added[name] = values

    def attached(self, name: str) -> NDArray[Any] | None:
        """A column that was added in memory, if it was."""
        return self.added.get(name)

    def _map(self, name: str) -> NDArray[Any]:
        found = _mapped(self._folder / f"{name}.bin", self._dtype(name))
        if name == "features" and self.manifest.feature_shape is not None:
            return found.reshape(-1, *self.manifest.feature_shape)
        return found

    def _dtype(self, name: str) -> str:
        if name == "tokens":
            assert self.manifest.token_dtype
            return self.manifest.token_dtype
        if name.startswith("array-"):
            return self.manifest.arrays[name.removeprefix("array-")]
        return "<i8" if name.startswith("ends-") else DTYPES[name]


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    """All values of a file, memory-mapped; DataError where it is missing."""
    if not path.is_file():
        raise DataError(f"{path}: missing from the prepared data; run `drumline prepare`")
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
