"""Sequence to sequence: an encoder reads a text, or hears a recording, and a decoder writes a text."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.audio import AudioPipeline
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import IGNORED, Arrays, Encoded, Row, StoredRows, Task, text_field
from drumline.data.tasks.recordings import encode_recording, heard, silence
from drumline.data.tokenizers import Request, Tokenizer
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Seq2Seq(data)


class Seq2Seq(Task):
    """One sample per row with two sequences of tokens, each with the special tokens that the tokenizer adds.

    The first has at most `sequence_length` tokens, the second `target_length`, by default as many. All of the
    second is trained.
    """

    needs_end = False
    columns = ("tokens", "starts", "lengths", "counts")

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.recordings = AudioPipeline(data.audio) if data.audio else None
        self.sequences = 1 if data.audio else 2

    def requests(self, row: Row) -> list[Request]:
        """Both texts."""
        data = self.data
        if data.audio:
            return [("encode_row", self._target(row), self._most, None)]
        source, target = self._texts(row)
        return [
            ("encode_row", source, data.sequence_length, None),
            ("encode_row", target, self._most, None),
        ]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Both sequences; `count` is 0 where one of them has no token."""
        assert tokenizer
        if self.data.audio:
            found = tokenizer.encode_row(self._target(row), self._most)
            parts = {
                "count": len(found.tokens),
                "tokens": found.tokens,
                "was_truncated": found.was_cut,
            }
            return encode_recording(self.recordings, row, self.data, parts, is_cut=False)
        source, target = self._texts(row)
        read = tokenizer.encode_row(source, self.data.sequence_length)
        written = tokenizer.encode_row(target, self._most)
        was_truncated = read.was_cut or written.was_cut
        if not len(read.tokens) or not len(written.tokens):
            return Encoded(count=0, was_truncated=was_truncated)
        count = len(written.tokens)
        sequences = (
            Encoded(count=0, tokens=read.tokens),
            Encoded(count=count, tokens=written.tokens),
        )
        return Encoded(count=count, sequences=sequences, was_truncated=was_truncated)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids and attention_mask, int64 [n, L], and targets, int64 [n, M], -100 in the padding."""
        if self.data.audio:
            written, there = rows.tokens(indices)
            targets = np.where(there, written, IGNORED)
            return {**heard(self.recordings, rows, indices), "targets": targets}
        ids, inside = rows.tokens(2 * indices)
        mask = inside.astype(np.int64)
        written, there = rows.tokens(2 * indices + 1)
        targets = np.where(there, written, IGNORED)
        return {"input_ids": ids * mask, "attention_mask": mask, "targets": targets}

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad both sequences to the longest ones that a row may have."""
        if self.data.audio:
            missing = max(0, (manifest.row_tokens or 0) - arrays["targets"].shape[1])
            return {**arrays, "targets": np.pad(arrays["targets"], ((0, 0), (0, missing)))}
        most = {"targets": min(self._most or 0, manifest.row_tokens or 0)}
        return {
            name: np.pad(
                values,
                ((0, 0), (0, max(0, most.get(name, manifest.row_tokens or 0) - values.shape[1]))),
            )
            for name, values in arrays.items()
        }

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero arrays of `collate`; the last token that is read is masked out, as in a padded batch."""
        if self.data.audio:
            written = np.zeros((count, manifest.longest or self._most or 1), dtype=np.int64)
            return {**silence(self.recordings, count), "targets": written}
        assert manifest.row_tokens
        ids = np.zeros((count, manifest.row_tokens), dtype=np.int64)
        mask = np.ones_like(ids)
        mask[:, -1] = 0
        targets = np.zeros((count, min(self._most or 0, manifest.row_tokens)), dtype=np.int64)
        return {"input_ids": ids, "attention_mask": mask, "targets": targets}

    @property
    def _most(self) -> int | None:
        return self.data.target_length or self.data.sequence_length

    def _target(self, row: Row) -> str:
        return text_field(row, self.data.completion_field, "completion_field")

    def _texts(self, row: Row) -> tuple[str, str]:
        return (
            text_field(row, self.data.prompt_field, "prompt_field"),
            self._target(row),
        )
