"""Language modelling on a stream of documents, or on whole documents side by side in rows."""

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
    return CausalLm(data)


class CausalLm(Task):
    """Rows of `sequence_length` tokens cut from one stream, plus the next token as the last target.

    Every token but the first of the stream is a target once. With `packing: documents` rows hold whole
    documents, longer ones in pieces, and every token but the first of a document is a target once.
    """

    is_stream = True
    columns = ("tokens", "starts", "lengths", "skipped", "counts")

    def requests(self, row: Row) -> list[Request]:
        """The text."""
        return [("encode", text_field(row, self.data.text_field, "text_field"))]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded:
        """The tokens of a document or a block of it, without an end token."""
        assert tokenizer
        tokens = tokenizer.encode(text_field(row, self.data.text_field, "text_field"))
        return Encoded(count=len(tokens), tokens=tokens)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids and targets, int64 [n, sequence_length]; of documents, as long as the longest row."""
        width = None if self.data.packs_documents else self.data.sequence_length
        return language_rows(rows, indices, width)

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero input_ids and targets, int64 [count, sequence_length]."""
        return blank_language_rows(count, self.data.sequence_length, self.data.packs_documents)
