"""Multi-label classification: any number of classes per row, each of them yes or no."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks.base import Row, StoredRows, Task, field_of
from drumline.data.tasks.classification import class_number
from drumline.data.tasks.of_rows import OfRows
from drumline.errors import DataError
from drumline.recipe.data_section import Data

CLASSES = "classes"
"""The array with the classes of a row that are yes."""


def build(data: Data) -> Task:
    """The task of a recipe's data section."""
    return MultiLabel(data)


class MultiLabel(OfRows):
    """A row has a list of class numbers, or of a yes or no for each class: true and false, or 1.0 and 0.0."""

    _is_list_of_all: bool | None = None
    _length: int | None = None
    _most = _fewest = -1

    def label(self, row: Row) -> dict[str, Any]:
        """The classes that are yes, and how many classes there are as far as this row tells."""
        field = self.data.label_field
        _, value = field_of(row, field)
        if not isinstance(value, list | tuple | np.ndarray):
            raise DataError(f"data.label_field: {field}: {value!r} is no list")
        values = list(value)
        of_all = bool(values) and all(isinstance(one, bool | np.bool_ | float) for one in values)
        if self._is_list_of_all is None and values:
            self._is_list_of_all = of_all
        if values and of_all != self._is_list_of_all:
            raise DataError(
                f"data.label_field: {field}: {value!r} is a list of "
                f"{'yes and no' if of_all else 'class numbers'}, and earlier rows were not"
            )
        if of_all and any(one not in (0, 1) for one in values):
            raise DataError(f"data.label_field: {field}: {value!r}: neither 0.0 nor 1.0")
        if of_all:
            yes, count = [number for number, one in enumerate(values) if one], len(values)
            self._length = self._length or count
            if count != self._length:
                raise DataError(
                    f"data.label_field: {field}: {count} yes and no, and earlier rows have {self._length}"
                )
        else:
            yes = [class_number(one, field) for one in values]
            count = max(yes, default=-1) + 1
            if len(set(yes)) < len(yes):
                raise DataError(
                    f"data.label_field: {field}: {value!r} names a class twice. Nearest: for a yes or no of "
                    "each class, true and false, or 1.0 and 0.0"
                )
        self._most = max(self._most, count)
        self._fewest = len(yes) if self._fewest < 0 else min(self._fewest, len(yes))
        return {"arrays": {CLASSES: np.array(sorted(yes), dtype=np.int32)}, "outputs": count}

    def check(self) -> None:
        """Refuse labels that say yes to every class in every row, as lists of 0 and 1 do for two classes."""
        if self._most > 0 and self._fewest == self._most:
            raise DataError(
                f"data.label_field: {self.data.label_field}: every row has all {self._most} classes, so "
                "there is nothing to learn. Nearest: for a yes or no of each class, true and false, or "
                "1.0 and 0.0"
            )

    def targets(self, rows: StoredRows, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """1 for each class of a row, else 0: float32 [n, classes]."""
        found = np.zeros((len(indices), rows.manifest.classes or 1), dtype=np.float32)
        for number, classes in enumerate(rows.array(CLASSES, indices)):
            found[number, classes] = 1.0
        return found

    def blank_targets(self, count: int, manifest: DatasetManifest) -> NDArray[np.float32]:
        """No class, float32 [n, classes]."""
        return np.zeros((count, manifest.classes or 1), dtype=np.float32)
