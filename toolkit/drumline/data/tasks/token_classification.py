"""Token classification: a class for each word of a row, such as the kind of name that it is part of."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import IGNORED, Arrays, Encoded, Row, StoredRows, Task, field_of
from drumline.data.tokenizers import Request, Tokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import Data

PLACES, CLASSES = "places", "classes"
"""The arrays with the first token of each word, and with its class."""


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return TokenClassification(data)


class TokenClassification(Task):
    """One sample per row of words; the first token of each word has its class, all others are ignored.

    Words that do not fit are cut off. A word that has no token, such as a control character, has no class.
    """

    needs_end = False
    columns = ("tokens", "starts", "lengths", "counts")

    def requests(self, row: Row) -> list[Request]:
        """The words."""
        return [("encode_words", self._words(row), self.data.sequence_length)]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """The tokens, and where classes stand; `count` is 0 where no word fits."""
        assert tokenizer
        words, classes = self._words(row), self._classes(row)
        if len(words) != len(classes):
            raise DataError(
                f"data.label_field: {self.data.label_field}: {len(classes)} classes of {len(words)} words"
            )
        found = tokenizer.encode_words(words, self.data.sequence_length)
        there = found.firsts >= 0
        arrays = {PLACES: found.firsts[there], CLASSES: classes[there]}
        outputs = len(self.data.label_names or ()) or int(classes.max(initial=-1)) + 1
        return Encoded(
            count=int(there.sum()),
            tokens=found.tokens,
            arrays=arrays,
            outputs=outputs,
            was_truncated=found.was_cut,
        )

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """input_ids, attention_mask and targets, int64 [n, L]; targets are classes."""
        ids, inside = rows.tokens(indices)
        mask = inside.astype(np.int64)
        targets = np.full_like(ids, IGNORED)
        both = zip(rows.array(PLACES, indices), rows.array(CLASSES, indices), strict=True)
        for number, (places, classes) in enumerate(both):
            targets[number, places] = classes
        return {"input_ids": ids * mask, "attention_mask": mask, "targets": targets}

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """All-zero arrays of `collate`; the last token of each row is masked out, as in a padded batch."""
        assert manifest.row_tokens
        ids = np.zeros((count, manifest.row_tokens), dtype=np.int64)
        mask = np.ones_like(ids)
        mask[:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, "targets": ids.copy()}

    def _words(self, row: Row) -> tuple[str, ...]:
        name = self.data.text_field
        is_there, value = field_of(row, name)
        if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            return tuple(value)
        found = f"it holds {type(value).__name__} {value!r:.60}"
        if not is_there:
            found = f"this row has: {', '.join(map(str, row)) or 'no columns'}"
        raise DataError(f"data.text_field: no list of words in column {name!r}; {found}")

    def _classes(self, row: Row) -> NDArray[np.int32]:
        name, names = self.data.label_field, self.data.label_names
        value = field_of(row, name)[1]
        if not isinstance(value, list | tuple | np.ndarray):
            raise DataError(f"data.label_field: {name}: {value!r:.60} is no list of classes")
        return np.array([_number(one, name, names) for one in value], dtype=np.int32)


def _number(value: Any, field: str, names: list[str] | None) -> int:
    """The number of a class that is given by number or, where there are names, by name."""
    if isinstance(value, str):
        if names is None:
            raise DataError(
                f"data.label_field: {field}: {value!r:.40} is a name, and data.label_names does not say "
                "which number it has. Nearest: data.label_names=[O, B-PER, I-PER, …]"
            )
        if value not in names:
            raise DataError(
                f"data.label_field: {field}: {value!r:.40} is none of data.label_names: {', '.join(names)}"
            )
        return names.index(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise DataError(f"data.label_field: {field}: {value!r:.40} is not a class number ≥ 0")
    if names is not None and value >= len(names):
        raise DataError(
            f"data.label_field: {field}: class {value}, and data.label_names has {len(names)}"
        )
    return int(value)
