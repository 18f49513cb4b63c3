"""Prepared rows, memory-mapped: what a prepared folder holds and how rows become arrays.

A folder has `card.json` and, for `train` and `validation`, raw little-endian arrays:

    tokens   uint16/uint32   all tokens of all rows          starts  int64 [N]   first token of a row
    lengths  int32 [N]       tokens of a row                 skipped int32 [N]   leading targets that
    counts   int32 [N]       label tokens of a row                               do not count
    features float32 [N, …]  labels int64 [N]                (classification)
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.card import read_card
from toolkit.errors import DataError

IGNORED = -100
DTYPES = {
    "starts": "<i8",
    "lengths": "<i4",
    "skipped": "<i4",
    "counts": "<i4",
    "labels": "<i8",
    "features": "<f4",
}

Arrays = dict[str, NDArray[Any]]


class Rows:
    """Random access to the rows of one part (`train` or `validation`); nothing is held in memory."""

    def __init__(self, folder: Path, part: str) -> None:
        card = read_card(folder)
        if card is None:
            raise DataError(f"{folder}: no prepared data; run `drumline prepare`")
        self.card = card
        self._folder = folder / part
        self.counts = self._map("counts")
        self._tokens = self._map("tokens", card.token_dtype) if card.token_dtype else None
        if self._tokens is not None:
            self._starts, self._lengths = self._map("starts"), self._map("lengths")
        self._skipped = self._map("skipped") if card.task != "classification" else None
        self._labels = self._map("labels") if card.task == "classification" else None
        self._features = None
        if card.feature_shape is not None:
            self._features = self._map("features").reshape(-1, *card.feature_shape)

    def __len__(self) -> int:
        return len(self.counts)

    def collate(self, indices: NDArray[np.int64]) -> Arrays:
        """Rows as arrays of one micro-batch, padded on the right to the longest row.

        causal_lm, sft: input_ids and targets, int64 [n, L], targets -100 where they do not count.
        classification: features float32 [n, …] or input_ids and attention_mask, and targets [n].
        """
        if self._features is not None:
            assert self._labels is not None
            return {"features": self._features[indices], "targets": self._labels[indices]}
        if self._labels is not None:
            ids, inside = self._gather(indices, None)
            mask = inside.astype(np.int64)
            return {
                "input_ids": ids * mask,
                "attention_mask": mask,
                "targets": self._labels[indices],
            }
        return self._language_rows(indices)

    def _language_rows(self, indices: NDArray[np.int64]) -> Arrays:
        assert self._skipped is not None
        width = self.card.sequence_length if self.card.task == "causal_lm" else None
        tokens, inside = self._gather(indices, width and width + 1)
        place = np.arange(tokens.shape[1] - 1)
        counted = inside[:, 1:] & (place >= self._skipped[indices][:, None])
        targets = np.where(counted, tokens[:, 1:], IGNORED)
        return {"input_ids": np.where(inside[:, 1:], tokens[:, :-1], 0), "targets": targets}

    def _gather(
        self, indices: NDArray[np.int64], width: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [n, width] (default: the longest row's) and which of them belong to the row."""
        assert self._tokens is not None
        lengths = self._lengths[indices]
        place = np.arange(width or int(lengths.max()))
        inside = place < lengths[:, None]
        where = np.where(inside, self._starts[indices][:, None] + place, 0)
        return self._tokens[where].astype(np.int64), inside

    def _map(self, name: str, dtype: str | None = None) -> NDArray[Any]:
        path = self._folder / f"{name}.bin"
        if not path.is_file():
            raise DataError(f"{path}: missing from the prepared data; run `drumline prepare`")
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=dtype or DTYPES[name])
        return np.asarray(np.memmap(path, dtype=dtype or DTYPES[name], mode="r"))
