"""Classification: one class per row, of a text, of two texts or of a feature array such as an image."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import Row, StoredRows, Task, field_of
from drumline.data.tasks.of_rows import OfRows
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return Classification(data)


class Classification(OfRows):
    """One class per row, a whole number from 0."""

    label_columns = ("labels",)

    def label(self, row: Row) -> dict[str, Any]:
        """The class, by its number or, where classes have names, by its name."""
        field, names = self.data.label_field, self.class_names or self.data.label_names
        _, value = field_of(row, field)
        if names and isinstance(value, str):
            if value not in names:
                raise DataError(
                    f"data.label_field: {field}: {value!r:.40} is none of the classes {', '.join(names[:20])}"
                )
            value = names.index(value)
        if isinstance(value, str) and value.isascii() and value.isdigit():  # CSV holds text
            value = int(value)
        return {"label": class_number(value, self.data.label_field)}

    def targets(self, rows: StoredRows, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The classes, int64 [n]."""
        return rows.column("labels")[indices]

    def blank_targets(self, count: int, manifest: DatasetManifest) -> NDArray[np.int64]:
        """Class 0, int64 [n]."""
        return np.zeros(count, dtype=np.int64)


def class_number(value: Any, field: str) -> int:
    """The number of a class; DataError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise DataError(f"data.label_field: {field}: {value!r} is not a class number ≥ 0")
    return int(value)
