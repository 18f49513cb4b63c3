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


ELEMENTS = "elements"
"""The array with the number of inputs that each image of a row becomes."""


class ChatWithImages(Sft):
    """Chats of which some have images; each distinct file is stored once in a part.

    A chat whose images do not all fit into `sequence_length` is left out.
    """

    is_traced_by_a_row = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        assert data.image
        self.processor = ChatProcessor(data.image)
        self._known_sizes: dict[str, tuple[NDArray[np.int64], ...]] = {}

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
        self.processor.begin()
        self._chats = ChatRows(self._form, self.data, tokenizer, self.processor)

    def _encode_rendered(
        self, chats: ChatRows, rendered: Rendered, tokenizer: Tokenizer
    ) -> Encoded:
        sample = super()._encode_rendered(chats, rendered, tokenizer)
        if sample.tokens is None:
            return sample
        if sample.was_truncated and rendered.images:
            whole, _ = chats.tokens(rendered, tokenizer)
            read = sample.tokens[:-1]  # the last token is a target only
            kept, needed = (self.processor.is_feature(one).sum() for one in (read, whole))
            if kept < needed:
                return Encoded(count=0, was_truncated=True)
        sizes = np.array(rendered.elements, dtype=np.int64)
        return replace(sample, files=rendered.images, arrays={**sample.arrays, ELEMENTS: sizes})

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
        """The shortest row with an image, where none of these has one."""
        if any(len(numbers) for numbers in rows.array(FILES, indices)):
            return None
        images, _, _ = self._sizes(rows)
        lengths = np.where(images > 0, rows.column("lengths"), np.iinfo(np.int32).max)
        return int(lengths.argmin()) if images.any() else None

    def largest(self, rows: StoredRows, count: int) -> NDArray[np.int64]:
        """The row with the most inputs, and the one with the largest image, to whose shape others are padded.

        One more row than asked for, where a micro-batch without images would have one beside it.
        """
        images, whole, single = self._sizes(rows)
        count += bool(images.any() and (images == 0).any())
        found = np.full(count, whole.argmax(), dtype=np.int64)
        if count > 1:
            found[-1] = single.argmax()
        return found

    def _sizes(self, rows: StoredRows) -> tuple[NDArray[np.int64], ...]:
        """Of each row: its images, the inputs that they become, and those of the largest; int64 [N] each."""
        if rows.part not in self._known_sizes:
            ends = rows.column(f"ends-{ELEMENTS}")
            images = np.diff(ends, prepend=0)
            values = np.append(rows.column(f"array-{ELEMENTS}"), 0)
            sums = np.append(0, np.cumsum(values[:-1]))
            single = np.zeros(len(ends), dtype=np.int64)
            np.maximum.at(single, np.repeat(np.arange(len(ends)), images), values[:-1])
            self._known_sizes[rows.part] = images, sums[ends] - sums[ends - images], single
        return self._known_sizes[rows.part]

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad what has a value for each token to the longest row."""
        tokens = {
            name: arrays[name]
            for name in ("input_ids", "targets", self.processor.types_name)
            if name in arrays
        }
        return arrays | super().widen(tokens, manifest)
