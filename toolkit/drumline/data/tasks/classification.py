"""Classification: one class per row, of a text or of a feature array such as an image."""

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import Arrays, Encoded, Row, StoredRows, Task, field_of, text_field
from drumline.data.tokenizers import Request, Tokenizer
from drumline.errors import DataError, PlanError
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Classification(data)


class Classification(Task):
    """One sample per row. The first row determines whether all rows have `features` or text."""

    needs_end = False
    _has_features = False

    def begin(self, first: Row) -> None:
        """Decide by the first row whether samples are text or features."""
        has_text = isinstance(field_of(first, self.data.text_field)[1], str)
        self._has_features = "features" in first and not has_text
        self.needs_tokenizer = not self._has_features
        stored = ("features",) if self._has_features else ("tokens", "starts", "lengths")
        self.columns = (*stored, "labels", "counts")

    def requests(self, row: Row) -> list[Request]:
        """The text, if there is one."""
        if self._has_features:
            return []
        text = text_field(row, self.data.text_field, "text_field")
        return [("encode_row", text, self.data.sequence_length)]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Features or tokens, and the class; `count` is 0 for a text without a token."""
        if self._has_features:
            return Encoded(count=1, features=_features(row), label=self._label(row))
        assert tokenizer
        text = text_field(row, self.data.text_field, "text_field")
        tokens, was_truncated = tokenizer.encode_row(text, self.data.sequence_length)
        if not len(tokens):
            return Encoded(count=0, was_truncated=was_truncated)
        return Encoded(count=1, tokens=tokens, label=self._label(row), was_truncated=was_truncated)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """Features float32 [n, …], or input_ids and attention_mask int64 [n, L]; targets int64 [n]."""
        targets = rows.column("labels")[indices]
        if rows.manifest.feature_shape is not None:
            return {"features": rows.column("features")[indices], "targets": targets}
        ids, inside = rows.tokens(indices)
        mask = inside.astype(np.int64)
        return {"input_ids": ids * mask, "attention_mask": mask, "targets": targets}

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """The arrays of `collate`, all zero; the last token of each row is masked, as in a padded batch."""
        targets = np.zeros(count, dtype=np.int64)
        if manifest.feature_shape is not None:
            features = np.zeros((count, *manifest.feature_shape), dtype=np.float32)
            return {"features": features, "targets": targets}
        if not manifest.row_tokens:
            is_text = self.data.source in ("files", "hub")  # other sources may give features
            raise PlanError(
                "--trace: the shape of a sample is not known until the data are prepared. "
                f"Nearest: `drumline prepare`{', or data.sequence_length' if is_text else ''}"
            )
        ids = np.zeros((count, manifest.row_tokens), dtype=np.int64)
        mask = np.ones_like(ids)
        mask[:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, "targets": targets}

    def _label(self, row: Row) -> int:
        _, value = field_of(row, self.data.label_field)
        if isinstance(value, str) and value.isascii() and value.isdigit():  # CSV holds text
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise DataError(
                f"data.label_field: {self.data.label_field}: {value!r} is not a class number ≥ 0"
            )
        return int(value)


def _features(row: Row) -> NDArray[np.float32]:
    try:
        values = np.asarray(row["features"], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"features: {error}") from None
    if values.size == 0 or not np.isfinite(values).all():
        raise DataError("features are empty or not finite")
    return values
