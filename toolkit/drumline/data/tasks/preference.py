"""Preferences: a prompt with a chosen and a rejected completion, or with one that is desirable or not."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import (
    BASELINE,
    IGNORED,
    REFERENCE,
    TURNS,
    Arrays,
    Encoded,
    Row,
    StoredRows,
    Task,
    blank_language_rows,
    language_rows,
    trained_targets,
)
from drumline.data.tasks.preference_rows import (
    COMPLETION,
    PROMPT,
    PreferenceForm,
    completions_of,
    is_desirable,
    recognise_preference,
)
from drumline.data.tasks.sft import Sft
from drumline.data.tokenizers import Request, Tokenizer
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Preference(data)


class Preference(Task):
    """One sample per row, which weighs 1: two sequences of tokens for a pair, else one and a label.

    The first row tells which of both all rows are. Each sequence is encoded as in supervised fine-tuning, of
    at most `sequence_length` + 1 tokens; a row is dropped where nothing of a completion fits.
    """

    columns: tuple[str, ...] = ("tokens", "starts", "lengths", "skipped", "counts")
    _form: PreferenceForm | None = None

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        fields = {"prompt_field": PROMPT, "completion_field": COMPLETION, "messages_field": None}
        self._inner = Sft(data.model_copy(update=fields))
        self._waiting: dict[int, list[Row]] = {}

    def begin(self, first: Row) -> None:
        """Recognise the style of the rows by the first one."""
        self._form = recognise_preference(first, self.data)
        self.style, self.is_chat = self._form.words, self._form.chats
        self.sequences = 2 if self._form.is_paired else 1
        if not self._form.is_paired:
            self.columns = (*self.columns, "labels")
            self.fewest_rows = 2  # each has the completion of another one beside it
        self._inner.begin(completions_of(first, self._form, self.data)[0])

    def use(self, tokenizer: Tokenizer) -> None:
        """Take the chat template of this tokenizer, if rows are chats."""
        self._inner.use(tokenizer)

    def requests(self, row: Row) -> list[Request]:
        """Those of each completion."""
        self._waiting[id(row)] = parts = self._parts(row)
        return [request for part in parts for request in self._inner.requests(part)]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """The sequences of a row; `count` is 0 where nothing of a completion fits into the row."""
        assert self._form
        parts = self._waiting.pop(id(row), None) or self._parts(row)
        label = None if self._form.is_paired else int(is_desirable(row, self.data))
        found = [self._inner.encode(part, tokenizer) for part in parts]
        sequences = tuple(one for one in found if one and one.count > 0)
        was_truncated = any(one is not None and one.was_truncated for one in found)
        if len(sequences) < len(found):
            return Encoded(count=0, was_truncated=was_truncated)
        return Encoded(count=1, sequences=sequences, label=label, was_truncated=was_truncated)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """Of pairs: input_ids and targets, int64 [2n, L], the chosen completions before the rejected ones.

        Of labelled rows: input_ids and targets, int64 [n, L]; `desirable`, float32 [n], 1 or 0; and
        baseline_input_ids and baseline_targets, int64 [n, K], each prompt with the completion of the row
        after it. Both have `reference`, float32 [n, 2], once it is known: log-probabilities of the chosen and
        the rejected completion, or of the own and the mismatched one.
        """
        if rows.manifest.sequences == 2:
            found = language_rows(rows, np.concatenate([2 * indices, 2 * indices + 1]), None)
        else:
            found = language_rows(rows, indices, None)
            found["desirable"] = rows.column("labels")[indices].astype(np.float32)
            found |= _mismatched(rows, indices)
        reference = rows.attached(REFERENCE)
        if reference is not None:
            found[REFERENCE] = reference[indices]
        return found

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad the sequences to the longest one."""
        wide = {name: v for name, v in arrays.items() if name.endswith(("input_ids", "targets"))}
        return arrays | super().widen(wide, manifest)

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero arrays of `collate`; L: of the longest row, if it is known."""
        length = manifest.row_tokens
        found = blank_language_rows(manifest.sequences * count, length)
        if manifest.sequences == 1:
            more = blank_language_rows(count, length)
            found |= {BASELINE + name: values for name, values in more.items()}
            found["desirable"] = np.zeros(count, dtype=np.float32)
        return found | {REFERENCE: np.zeros((count, 2), dtype=np.float32)}

    def _parts(self, row: Row) -> list[Row]:
        assert self._form
        return completions_of(row, self._form, self.data)


def _mismatched(rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
    """Inputs and targets of each row's prompt with the completion of the next row, int64 [n, K].

    The next one is that in the prepared data, so it does not depend on the split; it is cut at the longest
    row.
    """
    others = (indices + 1) % len(rows.column("counts"))
    skipped = rows.column("skipped")
    found = []
    for own, other in zip(indices, others, strict=True):
        pair = np.array([own, other])
        (mine, theirs), inside = rows.tokens(pair)
        prompt = mine[inside[0]][: skipped[own] + 1]
        counted = np.zeros(int(inside[1].sum()), dtype=bool)
        if TURNS in rows.manifest.arrays:
            edges = rows.array(TURNS, pair[1:])[0]
            counted[1:] = trained_targets(edges, len(counted) - 1)
        else:
            counted[skipped[other] + 1 :] = True
        completion = theirs[inside[1]][skipped[other] + 1 :]
        ids = np.concatenate([prompt, completion])
        target = np.concatenate([np.zeros(len(prompt), dtype=bool), counted[skipped[other] + 1 :]])
        most = (rows.manifest.longest or len(ids)) + 1
        found.append((ids[:most], target[:most]))
    width = max(len(ids) for ids, _ in found) - 1
    inputs = np.zeros((len(found), width), dtype=np.int64)
    targets = np.full((len(found), width), IGNORED, dtype=np.int64)
    for number, (ids, target) in enumerate(found):
        inputs[number, : len(ids) - 1] = ids[:-1]
        targets[number, : len(ids) - 1] = np.where(target[1:], ids[1:], IGNORED)
    return {BASELINE + "input_ids": inputs, BASELINE + "targets": targets}
