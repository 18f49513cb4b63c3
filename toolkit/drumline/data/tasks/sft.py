"""Supervised fine-tuning on prompt and completion, or on chats; the loss mask leaves out all else."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.chats.messages import ChatFormat, recognise
from drumline.data.chats.rows import ChatRows, Rendered
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import (
    TURNS,
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
    """One sample per row, of at most `sequence_length` + 1 tokens; micro-batches are padded.

    The first row tells whether rows are chats, and of which style. Chats are also stored with the array
    `turns`.
    """

    columns = ("tokens", "starts", "lengths", "skipped", "counts")
    _chats: ChatRows | None = None
    _form: ChatFormat | None = None

    def begin(self, first: Row) -> None:
        """Recognise the style of the rows by the first one."""
        self._form = recognise(first, self.data)
        self.is_chat = self._form is not None
        self.style = "" if self._form is None else self._form.words
        self._waiting: dict[int, Rendered] = {}

    def use(self, tokenizer: Tokenizer) -> None:
        """Take the chat template of this tokenizer, if rows are chats."""
        if self._form is not None:
            self._chats = ChatRows(self._form, self.data, tokenizer)

    def requests(self, row: Row) -> list[Request]:
        """Prompt and completion, as one text, or the text of the chat."""
        if self._chats is None:
            return [("encode_pair", *self._texts(row))]
        rendered = self._chats.render(row)
        self._waiting[id(row)] = rendered
        return [rendered.request] if rendered.request else []

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Tokens of prompt, completion and end, or of a chat; targets are what is trained of it.

        `count` is 0 where nothing that is trained fits into the row.
        """
        assert tokenizer and tokenizer.end is not None and self.data.sequence_length
        if self._chats is not None:
            rendered = self._waiting.pop(id(row), None) or self._chats.render(row)
            return self._encode_rendered(self._chats, rendered, tokenizer)
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

    def _encode_rendered(
        self, chats: ChatRows, rendered: Rendered, tokenizer: Tokenizer
    ) -> Encoded:
        """A chat as a sample; `count` is 0 where nothing that is trained fits into the row."""
        assert self.data.sequence_length
        tokens, trained = chats.tokens(rendered, tokenizer)
        begin = tokenizer.begin if self.data.bos is True else None
        if begin is not None and begin not in tokens[:1]:
            tokens = np.insert(tokens, 0, np.uint32(begin))
            trained = np.insert(trained, 0, False)
        most = self.data.sequence_length + 1
        was_truncated = len(tokens) > most
        tokens, trained = tokens[:most], trained[:most]
        trained[:1] = False  # nothing precedes the first token
        count = int(trained.sum())
        if count == 0:
            return Encoded(count=0, was_truncated=was_truncated)
        edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
        return Encoded(
            count=count,
            tokens=tokens,
            prompt_targets=int(edges[0]) - 1,
            arrays={TURNS: edges.astype(np.int32)},
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
        return blank_language_rows(count, manifest.row_tokens, self.data.packs_documents)
