"""Samples of a data set of the project (`__len__`, `__getitem__`), which are made while they are trained."""

import hashlib
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.factory import load_factory
from drumline.data.tasks.base import Arrays, Encoded, Row, StoredRows, Task, refuse_own_weights
from drumline.data.tokenizers import Tokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import ALONE, Data

INDEX, PROBE = "index", "probe"
"""The arrays with the number of a sample, and with the digest of one that was looked at in advance."""
PROBES = 64
"""Samples that are hashed by `prepare`, so that other data under the same code are noticed."""


def open_dataset(data: Data, project: str | None) -> Any:
    """The data set; DataError where the project's function returns none."""
    assert data.factory
    try:
        found = load_factory(data.factory, project)(**data.options)
    except TypeError as error:
        raise DataError(
            f"data.options: {data.options} do not suit {data.factory}: {error}"
        ) from None
    lacking = [name for name in ("__len__", "__getitem__") if not hasattr(found, name)]
    if lacking:
        raise DataError(
            f"data.factory: {data.factory} made a {type(found).__name__} without {lacking[0]}. Nearest: a "
            "torch.utils.data.Dataset with a length"
        )
    return found


class MapStyle(Task):
    """Each sample weighs 1. What it is made of is read anew each time, so it may be augmented.

    Before a sample is made, the generators of Python, numpy and torch are seeded by (seed, epoch, sample).
    """

    needs_tokenizer = False
    draws = True
    columns = ("counts",)

    def __init__(self, data: Data, project: str | None) -> None:
        super().__init__(data)
        self.project = project
        self._open: dict[str, Any] = {}
        self._step = 1
        self._first: dict[str, Any] = {}

    def begin(self, first: Row) -> None:
        """Choose which samples are looked at."""
        self._step = max(1, len(self.dataset("train")) // PROBES)

    def dataset(self, part: str) -> Any:
        """The data set of a part, opened once in each process."""
        sets = self.data.evaluation_sets()
        name = part.removeprefix("evaluation-")
        own = sets[name] if part.startswith("evaluation-") and name in sets else self.data
        key = name if own is not self.data else ALONE + "/train"
        if key not in self._open:
            self._open[key] = open_dataset(own, self.project)
        return self._open[key]

    def encode(self, row: Row, tokenizer: Tokenizer | None) -> Encoded | None:
        """The sample's number, and a digest of some of them."""
        number = int(row["index"])
        digest = np.zeros(0, dtype=np.uint8)
        if number % self._step == 0:
            digest = np.frombuffer(self._probe(self.dataset("train"), number), dtype=np.uint8)
        index = np.array([number], dtype=np.int64)
        return Encoded(count=1, arrays={INDEX: index, PROBE: digest})

    def still_holds(self, rows: StoredRows) -> bool:
        """Whether the samples of a prepared part that were looked at are what they were."""
        dataset, everyone = self.dataset("train"), np.arange(len(rows.column("counts")))
        stored = zip(rows.array(INDEX, everyone), rows.array(PROBE, everyone), strict=True)
        return all(
            number < len(dataset) and self._digest_of(dataset, number) == digest.tobytes()
            for (number,), digest in stored
            if len(digest)
        )

    def _probe(self, dataset: Any, number: int) -> bytes:
        """The digest of a sample; DataError where it is not like the first one, or another the next time."""
        arrays = self._batch(dataset, [number], [0])
        kinds = {name: values.dtype.name for name, values in arrays.items()}
        self._first = self._first or kinds
        if kinds != self._first:
            raise DataError(
                f"data.factory: {self.data.factory}: sample {number:,} has {_listed(kinds)}, and sample 0 "
                f"has {_listed(self._first)}. Nearest: the same names and types in all"
            )
        found = _digest(arrays)
        if self._digest_of(dataset, number) != found:
            raise DataError(
                f"data.factory: {self.data.factory}: sample {number:,} is another one each time that it is "
                "read. Nearest: draw from random, numpy.random or torch, which are seeded by (seed, epoch, "
                "sample) before each sample"
            )
        return found

    def _digest_of(self, dataset: Any, number: int) -> bytes:
        """SHA-256 of a sample as a batch, made with seed 0."""
        return _digest(self._batch(dataset, [int(number)], [0]))

    def collate_drawn(
        self, rows: StoredRows, indices: NDArray[np.int64], seeds: NDArray[np.uint64]
    ) -> Arrays:
        """The arrays of the data set's `collate`, or its samples stacked."""
        dataset = self.dataset(rows.part)
        numbers = np.concatenate(rows.array(INDEX, indices)).tolist()
        return self._batch(dataset, numbers, seeds.tolist())

    def widen(self, arrays: Arrays, manifest: DatasetManifest) -> Arrays:
        """As they are: the largest sample is not known."""
        return arrays

    def blank(self, count: int, manifest: DatasetManifest) -> Arrays:
        """The first sample as often as there are samples, all zero."""
        dataset = self.dataset("train")
        arrays = self._batch(dataset, [0] * count, [0] * count)
        return {name: np.zeros_like(values) for name, values in arrays.items()}

    def _sample(self, dataset: Any, number: int, seed: int) -> Any:
        """A sample, with all generators seeded."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch = sys.modules.get("torch")
        if torch:
            torch.default_generator.manual_seed(seed % 2**63)
        try:
            return dataset[number]
        except Exception as error:
            raise DataError(
                f"data.factory: {self.data.factory}: sample {number:,}: {type(error).__name__}: {error}"
            ) from error

    def _batch(self, dataset: Any, numbers: list[int], seeds: list[int]) -> Arrays:
        """Named arrays of the samples of these numbers."""
        samples = [self._sample(dataset, *both) for both in zip(numbers, seeds, strict=True)]
        collate: Callable[[list[Any]], Any] = getattr(dataset, "collate", _stacked)
        try:
            found = collate(samples)
            if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
                raise TypeError(
                    f"a batch is a mapping of names to tensors, not {type(found).__name__}"
                )
            arrays = {name: _array(name, value) for name, value in found.items()}
            refuse_own_weights(arrays)
            return arrays
        except Exception as error:
            which = ", ".join(f"{number:,}" for number in numbers[:4])
            raise DataError(
                f"data.factory: {self.data.factory}: samples {which}: {type(error).__name__}: {error}"
            ) from error


def _stacked(samples: list[Any]) -> dict[str, Any]:
    """Samples side by side: mappings by name; of pairs, `features` and `targets`."""
    if isinstance(samples[0], tuple | list) and len(samples[0]) == 2:
        samples = [{"features": one, "targets": other} for one, other in samples]
    if not isinstance(samples[0], dict):
        raise TypeError(
            "a sample is a mapping, or a pair of input and target, not "
            f"{type(samples[0]).__name__}. Nearest: a method collate(samples) of the data set"
        )
    found = {}
    for name in dict.fromkeys(name for one in samples for name in one):
        if any(name not in one for one in samples):
            raise ValueError(f"only some have {name!r}. Nearest: the same names in all")
        arrays = [_array(name, one[name]) for one in samples]
        shapes = {values.shape for values in arrays}
        if len(shapes) > 1:
            raise ValueError(
                f"{name!r} has the shapes {' and '.join(map(str, sorted(shapes)))}. Nearest: a method "
                "collate(samples) of the data set that pads them"
            )
        found[name] = np.stack(arrays)
    return found


def _array(name: str, value: Any) -> NDArray[Any]:
    """A tensor or anything like an array as one of numpy; floats have 32 bits."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    found = np.asarray(value)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"{name!r} holds {found.dtype}, and not numbers. Nearest: a tensor")
    return found.astype(np.float32) if found.dtype.kind == "f" else found


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"


def _digest(arrays: Arrays) -> bytes:
    found = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return found.digest()
