"""Regression: a number per row, or several, of a text, of two texts or of a feature array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import Row, StoredRows, Task, field_of
from drumline.data.tasks.of_rows import OfRows
from drumline.errors import DataError
from drumline.recipe.data_section import Data

OUTPUTS = "outputs"
"""The array with the numbers of a row."""


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Regression(data)


class Regression(OfRows):
    """As many numbers per row as the first row has."""

    has_fixed_outputs = True
    _count: int | None = None

    def label(self, row: Row) -> dict[str, Any]:
        """The numbers, and how many outputs the head needs."""
        field = self.data.label_field
        _, value = field_of(row, field)
        values = value if isinstance(value, list | tuple | np.ndarray) else [value]
        if not len(values) or any(isinstance(one, bool) or one is None for one in values):
            raise DataError(f"data.label_field: {field}: {value!r} is no number")
        try:  # a CSV holds text
            numbers = np.array([float(one) for one in values], dtype=np.float32)
        except (TypeError, ValueError):
            raise DataError(f"data.label_field: {field}: {value!r} is no number") from None
        if not np.isfinite(numbers).all():
            raise DataError(f"data.label_field: {field}: {value!r} is not finite in fp32")
        self._count = self._count or len(numbers)
        if len(numbers) != self._count:
            raise DataError(
                f"data.label_field: {field}: {len(numbers)} numbers, and earlier rows have {self._count}"
            )
        return {"arrays": {OUTPUTS: numbers}, "outputs": len(numbers)}

    def targets(self, rows: StoredRows, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The numbers, float32 [n, outputs]."""
        return np.stack(rows.array(OUTPUTS, indices))

    def blank_targets(self, count: int, manifest: DatasetManifest) -> NDArray[np.float32]:
        """Zero, float32 [n, outputs]."""
        return np.zeros((count, manifest.classes or 1), dtype=np.float32)
