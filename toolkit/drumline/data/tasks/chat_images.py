"""Chats with images, for models that read both; transformers' processors make the pixels."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from drumline.data.chats.processor import ChatProcessor
from drumline.data.chats.rows import ChatRows, Rendered
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import FILE, FILES, Arrays, Encoded, Row, StoredRows, Task
from drumline.data.tasks.sft import Sft
from drumline.data.tokenizers import Tokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return ChatWithImages(data)


class ChatWithImages(Sft):
    """Chats of which some have images; each distinct file is stored once in a part.

    A chat whose images do not all fit into `sequence_length` is left out.
    """

    is_traced_by_a_row = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        assert data.image
        self.processor = ChatProcessor(data.image)
        self._counts: NDArray[np.int64] | None = None

    def begin(self, first: Row) -> None:
        """Recognise the style of the chats by the first one; DataError where rows are no chats."""
        super().begin(first)
        if not self.is_chat:
            raise DataError(
                "data.image: rows of a prompt and a completion have no place for an image. Nearest: a column "
                "messages, of {role, content}"
            )

    def use(self, tokenizer: Tokenizer) -> None:
        """Take the chat template of the processor, or of this tokenizer."""
        assert self._form
        self._chats = ChatRows(self._form, self.data, tokenizer, self.processor)

    def _encode_rendered(
        self, chats: ChatRows, rendered: Rendered, tokenizer: Tokenizer
    ) -> Encoded:
        sample = super()._encode_rendered(chats, rendered, tokenizer)
        if sample.tokens is None:
            return sample
        if sample.was_truncated and rendered.images:
            whole, _ = chats.tokens(rendered, tokenizer)
            kept, needed = (self.processor.is_feature(one).sum() for one in (sample.tokens, whole))
            if kept < needed:
                return Encoded(count=0, was_truncated=True)
        return replace(sample, files=rendered.images)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids and targets, int64 [n, L], and what the processor makes of the images of these rows.

        Also the types of tokens, int64 [n, L], for models that are given them.
        """
        found = self._typed(super().collate(rows, indices))
        files = [
            [raw.tobytes() for raw in rows.array(FILE, numbers.astype(np.int64))]
            for numbers in rows.array(FILES, indices)
        ]
        return found | self.processor.inputs(files)

    def _typed(self, arrays: Arrays) -> Arrays:
        name = self.processor.types_name
        return arrays | ({name: self.processor.types(arrays["input_ids"])} if name else {})

    def companion(self, rows: StoredRows, indices: NDArray[np.int64]) -> int | None:
        """A row with an image, of the fewest features, where none of these has one."""
        if any(len(numbers) for numbers in rows.array(FILES, indices)):
            return None
        counts = self._features(rows)
        return (
            int(np.where(counts > 0, counts, counts.max() + 1).argmin()) if counts.any() else None
        )

    def largest(self, rows: StoredRows) -> int:
        """The row with the most features of images."""
        return int(self._features(rows).argmax())

    def _features(self, rows: StoredRows) -> NDArray[np.int64]:
        """How many tokens of each row are features of its images, int64 [N]."""
        if self._counts is None:
            is_feature = self.processor.is_feature(rows.column("tokens"))
            self._counts = np.add.reduceat(is_feature, rows.column("starts"), dtype=np.int64)
        return self._counts

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad what has a value for each token to the longest row."""
        tokens = {
            name: arrays[name]
            for name in ("input_ids", "targets", self.processor.types_name)
            if name in arrays
        }
        return arrays | super().widen(tokens, manifest)
