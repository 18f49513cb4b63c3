"""Supervised fine-tuning: a prompt and its completion; only the completion is learnt."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import (
    Arrays,
    Encoded,
    Row,
    StoredRows,
    Task,
    blank_language_rows,
    language_rows,
    text_field,
)
from drumline.data.tokenizers import Tokenizer


class Sft(Task):
    """One row, one sample of at most `sequence_length` + 1 tokens; rows are padded in a micro-batch."""

    columns = ("tokens", "starts", "lengths", "skipped", "counts")

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Prompt, completion and end; targets are the completion's tokens and the end.

        None where the prompt leaves no room for a target.
        """
        assert tokenizer and self.data.sequence_length
        most = self.data.sequence_length + 1
        prompt = tokenizer.encode(text_field(row, self.data.prompt_field, "prompt_field"))
        completion = tokenizer.encode(
            text_field(row, self.data.completion_field, "completion_field")
        )
        whole = np.concatenate([prompt, completion, [np.uint32(tokenizer.end)]])
        tokens = whole[:most]
        prompt_targets = max(0, len(prompt) - 1)
        count = len(tokens) - 1 - prompt_targets
        was_truncated = len(whole) > most
        if count <= 0:
            return Encoded(count=0, was_truncated=was_truncated)
        return Encoded(
            count=count,
            tokens=tokens,
            prompt_targets=prompt_targets,
            was_truncated=was_truncated,
        )

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids and targets, int64 [n, L], L the longest row's."""
        return language_rows(rows, indices, None)

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """The same at `sequence_length`, all zero."""
        return blank_language_rows(count, self.data.sequence_length)
