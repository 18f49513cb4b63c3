"""Supervised fine-tuning on prompt and completion; the loss mask excludes the prompt."""

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
from drumline.data.tokenizers import Request, Tokenizer
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Sft(data)


class Sft(Task):
    """One sample per row, of at most `sequence_length` + 1 tokens; micro-batches are padded."""

    columns = ("tokens", "starts", "lengths", "skipped", "counts")

    def requests(self, row: Row) -> list[Request]:
        """Prompt and completion, as one text."""
        return [("encode_pair", *self._texts(row))]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Tokens of prompt, completion and end; targets are the completion's tokens and the end token.

        `count` is 0 where the prompt leaves no room for a target.
        """
        assert tokenizer and tokenizer.end is not None and self.data.sequence_length
        most = self.data.sequence_length + 1
        both, of_prompt = tokenizer.encode_pair(*self._texts(row))
        begin = np.array([] if tokenizer.begin is None else [tokenizer.begin], dtype=np.uint32)
        whole = np.append(np.concatenate([begin, both]), np.uint32(tokenizer.end))
        tokens = whole[:most]
        prompt_targets = max(0, len(begin) + of_prompt - 1)
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

    def _texts(self, row: Row) -> tuple[str, str]:
        return (
            text_field(row, self.data.prompt_field, "prompt_field"),
            text_field(row, self.data.completion_field, "completion_field"),
        )

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids and targets, int64 [n, L]; L: tokens of the longest row minus one."""
        return language_rows(rows, indices, None)

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero input_ids and targets, int64 [count, L]; L: of the longest row, if it is known."""
        return blank_language_rows(count, manifest.row_tokens)
