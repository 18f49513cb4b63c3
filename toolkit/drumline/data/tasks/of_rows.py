"""Tasks with labels of whole rows: of a text, of two texts, or of a feature array such as an image."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.audio import AudioPipeline
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.images import Pipeline, check, pipeline
from drumline.data.tasks.base import Arrays, Encoded, Row, StoredRows, Task, field_of, text_field
from drumline.data.tasks.recordings import encode_recording, heard, silence
from drumline.data.tokenizers import Request, Tokenizer
from drumline.errors import DataError, PlanError
from drumline.recipe.data_section import Data

IMAGE = "image"
"""The array with the bytes of an image's file."""
TRAIN = "train"
"""The part whose images are augmented."""
SECOND = "second"
"""The array with the first token of a row's second text, where the model is told which text a token is of."""


class OfRows(Task):
    """One sample per row. The first row determines whether all rows have `features` or text.

    Subclasses implement `label` and `targets`. `label_columns`: the columns that `label` fills.
    """

    needs_end = False
    label_columns: tuple[str, ...] = ()
    _has_features = False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.draws = data.image is not None
        self._pipeline: Pipeline | None = None
        self.recordings = AudioPipeline(data.audio) if data.audio else None

    def label(self, row: Row) -> dict[str, Any]:
        """What of `Encoded` holds the label of a row, by name; DataError for an invalid one."""
        raise NotImplementedError

    def targets(self, rows: StoredRows, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The targets of these rows, [n] or [n, outputs]."""
        raise NotImplementedError

    def blank_targets(self, count: int, manifest: DatasetManifest) -> NDArray[Any]:
        """All-zero targets of `count` rows."""
        raise NotImplementedError

    def begin(self, first: Row) -> None:
        """Decide by the first row whether samples are text or features, if they are no images."""
        if self.data.image is not None:
            self.needs_tokenizer = False
            self.columns = (*self.label_columns, "counts")
            self.feature_shape = self.images.shape
            return
        if self.data.audio is not None:
            self.needs_tokenizer = False
            self.columns = (*self.label_columns, "counts")
            return
        has_text = isinstance(field_of(first, self.data.text_field)[1], str)
        self._has_features = "features" in first and not has_text
        self.needs_tokenizer = not self._has_features
        stored = ("features",) if self._has_features else ("tokens", "starts", "lengths")
        self.columns = (*stored, *self.label_columns, "counts")

    def requests(self, row: Row) -> list[Request]:
        """The text or the two texts, if there are any."""
        if not self.needs_tokenizer:
            return []
        return [("encode_row", *self._texts(row))]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """Features or tokens, and the label; `count` is 0 for a text without a token."""
        if self.data.image is not None:
            return self._encode_image(row)
        if self.data.audio is not None:
            return encode_recording(self.recordings, row, self.data, self.label(row), is_cut=True)
        if self._has_features:
            return Encoded(count=1, features=_features(row), **self.label(row))
        assert tokenizer
        found = tokenizer.encode_row(*self._texts(row))
        if not len(found.tokens):
            return Encoded(count=0, was_truncated=found.was_cut)
        label = self.label(row)
        if found.second is not None:
            second = {SECOND: np.array([found.second], dtype=np.int32)}
            label["arrays"] = {**label.get("arrays", {}), **second}
        return Encoded(count=1, tokens=found.tokens, was_truncated=found.was_cut, **label)

    def collate(self, rows: StoredRows, indices: NDArray[np.int64]) -> Arrays:
        """Features float32 [n, …], or input_ids and attention_mask int64 [n, L]; `targets`.

        Also token_type_ids int64 [n, L], 1 from the second text on, where the tokenizer has them.
        """
        targets = self.targets(rows, indices)
        if self.data.audio is not None:
            return {**heard(self.recordings, rows, indices), "targets": targets}
        if rows.manifest.feature_shape is not None:
            return {"features": rows.column("features")[indices], "targets": targets}
        ids, inside = rows.tokens(indices)
        mask = inside.astype(np.int64)
        found = {"input_ids": ids * mask, "attention_mask": mask, "targets": targets}
        if SECOND in rows.manifest.arrays:
            second = np.concatenate(rows.array(SECOND, indices))[:, None]
            found["token_type_ids"] = mask * (np.arange(ids.shape[1]) >= second)
        return found

    @property
    def images(self) -> Pipeline:
        """What becomes of an image; made once in each process."""
        if self._pipeline is None:
            assert self.data.image
            self._pipeline = pipeline(self.data.image, self.project)
        return self._pipeline

    def _encode_image(self, row: Row) -> Encoded:
        """The image's file, which can be decoded, and the label."""
        _, raw = field_of(row, str(self.data.image_field))
        check(raw)
        label = self.label(row)
        file = {IMAGE: np.frombuffer(raw, dtype=np.uint8)}
        return Encoded(count=1, **{**label, "arrays": {**label.get("arrays", {}), **file}})

    def collate_drawn(
        self, rows: StoredRows, indices: NDArray[np.int64], seeds: NDArray[np.uint64]
    ) -> Arrays:
        """Features float32 [n, channels, height, width], augmented if the rows are trained; `targets`."""
        is_trained = rows.part == TRAIN
        files = zip(rows.array(IMAGE, indices), seeds.tolist(), strict=True)
        pixels = [self.images.pixels(raw.tobytes(), seed, is_trained) for raw, seed in files]
        return {"features": np.stack(pixels), "targets": self.targets(rows, indices)}

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """Pad the inputs to the longest row; targets are of a row, not of its tokens."""
        if self.data.audio is not None:
            return arrays
        return {**super().widen(arrays, manifest), "targets": arrays["targets"]}

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """The arrays of `collate`, all zero; the last token of each row is masked, as in a padded batch."""
        targets = self.blank_targets(count, manifest)
        if self.data.audio is not None:
            return {**silence(self.recordings, count), "targets": targets}
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

    def _texts(self, row: Row) -> tuple[str, int | None, str | None]:
        """The text, how many tokens a row may have, and the second text if rows have two."""
        data = self.data
        text, other = text_field(row, data.text_field, "text_field"), None
        if data.text_pair_field is not None:
            other = text_field(row, data.text_pair_field, "text_pair_field")
        return text, data.sequence_length, other


def _features(row: Row) -> NDArray[np.float32]:
    try:
        values = np.asarray(row["features"], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"features: {error}") from None
    if values.size == 0 or not np.isfinite(values).all():
        raise DataError("features are empty or not finite")
    return values
