"""Writes the rows of a recipe's sources, their validation rows and evaluation sets into a new folder."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drumline.data import cache, sources
from drumline.data.dataset_manifest import DatasetManifest, part_of_set, sizes
from drumline.data.files import classes_of
from drumline.data.media import MediaFiles, has_media
from drumline.data.part_writer import PartWriter
from drumline.data.processors import processor_digests
from drumline.data.readers import Reading
from drumline.data.row_checks import (
    one_dtype_each,
    refuse_empty,
    refuse_few,
    refuse_other_outputs,
    refuse_others,
)
from drumline.data.rows import DTYPES, array_columns
from drumline.data.source_row import SourceRow
from drumline.data.tasks import Task, find_task
from drumline.data.tasks.base import FILE
from drumline.data.tokenize_ahead import TokenizeAhead
from drumline.data.tokenizers import HubTokenizer, Tokenizer, find_tokenizer
from drumline.data.validation_split import TRAIN, VALIDATION
from drumline.data.write_rows import Seen, Writers, write_documents, write_samples, write_stream
from drumline.errors import DataError
from drumline.recipe.data_section import Data

Progress = Callable[[int, int, float], None]
"""Called with documents read, tokens (or rows) written, and the share of the files that is read so far."""


@dataclass
class _Source:
    """The rows of one source, and the task that encodes them."""

    data: Data
    task: Task
    rows: Iterator[SourceRow]
    reading: Reading


def _class_names(data: Data) -> list[str] | None:
    """Names of the classes: stated, or those of the folders that training images lie in."""
    if data.label_names is not None:
        return data.label_names
    found = [classes_of(own) or [] for own in data.sources().values()]
    names = sorted(set().union(*found))
    if len(names) == 1:
        raise DataError(
            f"data.path: all images lie in one folder of a class, {names[0]}, so nothing can be learnt. "
            "Nearest: a folder for each class"
        )
    return names or None


def _open(data: Data, project: str | None, names: list[str] | None, media: MediaFiles) -> _Source:
    reading = Reading(0)
    task, rows = find_task(data, project), sources.read(data, project, reading, media.of_another())
    task.class_names = names
    first = next(rows, None)
    if first is None:
        raise DataError("data: the source has no rows")
    task.begin(first.fields)
    return _Source(data, task, itertools.chain([first], rows), reading)


class DataSetWriter:
    """One prepare: all sources are opened, their rows written, then the manifest.

    DataError where rows do not go together, or a part has none.
    """

    def __init__(self, data: Data, project: str | None, folder: Path, progress: Progress) -> None:
        self._data, self._project, self._folder, self._progress = data, project, folder, progress
        self._media, self._seen = MediaFiles(), Seen()
        self._names = _class_names(data)
        self._opened: dict[str, _Source] = {}
        for label, own in data.sources().items():
            with cache.told_of(cache.key_of_source(data, label)):
                self._opened[label] = _open(own, project, self._names, self._media)
        self._task = next(iter(self._opened.values())).task
        self._tokenizer = self._dtype = None
        if self._task.needs_tokenizer:
            self._tokenizer = find_tokenizer(
                data.tokenizer, data.bos, self._task.needs_end, data.special_tokens_in_text
            )
            self._dtype = "<u2" if self._tokenizer.vocabulary <= 1 << 16 else "<u4"
        self._train = PartWriter(folder / TRAIN, self._dtype)
        self._writers: Writers = {TRAIN: self._train}
        self._mixture: dict[str, int] = {}
        self._validation: dict[str, int] = {}

    def write(self) -> None:
        """Write everything into the folder; it is not published yet."""
        for label, source in self._opened.items():
            self._write_source(label, source)
        for name, own in self._data.evaluation_sets().items():
            self._write_evaluation_set(name, own)
        arrays = self._close()
        self._manifest(arrays).write(self._folder)

    def _write_source(self, label: str, source: _Source) -> None:
        """Write a source's training rows behind those before, and its validation rows as a part."""
        train, before = self._train, self._train.rows
        parts: Writers = {TRAIN: train}
        if self._data.validation or not label:
            part = part_of_set(label) if label else VALIDATION
            parts[VALIDATION] = self._writers[part] = PartWriter(self._folder / part, self._dtype)
        with cache.told_of(cache.key_of_source(self._data, label)):
            refuse_others(self._task, source.task)
            its = Seen(feature_shape=self._seen.feature_shape)
            _write_rows(source, self._tokenizer, parts, its, self._progress)
            source.task.check()
            refuse_other_outputs(self._task, self._seen, its)
            held_out = parts[VALIDATION].rows if VALIDATION in parts else 0
            refuse_empty(source.data, its, train.rows - before, held_out)
        self._seen.join(its)
        self._mixture[label], self._validation[label] = train.rows - before, held_out

    def _write_evaluation_set(self, name: str, own: Data) -> None:
        part = part_of_set(name)
        writer = self._writers[part] = PartWriter(self._folder / part, self._dtype)
        with cache.told_of(cache.key_of_set(name)):
            source = _open(own, self._project, self._names, self._media)
            refuse_others(self._task, source.task)
            self._seen.add(_write_set(source, self._tokenizer, writer, self._seen, self._progress))
        self._validation[name] = writer.rows

    def _close(self) -> dict[str, str]:
        """Close the parts and the media; the dtypes of the arrays of a task of the project."""
        refuse_few(self._task, self._writers)
        if self._data.is_chat_with_images and FILE not in self._train.arrays:
            raise DataError(
                "data.image: no training row has an image. Nearest: data.image_field, the column with "
                "the images"
            )
        arrays = one_dtype_each(self._writers)
        own_columns = [column for name in arrays for column in array_columns(name)]
        for writer in self._writers.values():
            writer.close([*self._task.columns, *own_columns])
        if has_media(self._data):
            self._media.write(self._folder)
        return arrays

    def _manifest(self, arrays: dict[str, str]) -> DatasetManifest:
        data, task, tokenizer, seen = self._data, self._task, self._tokenizer, self._seen
        train, writers = self._train, self._writers
        mixture = self._mixture if data.mixture else {}
        styles = (source.task.style for source in self._opened.values())
        return DatasetManifest(
            task=data.task,
            fingerprint=_fingerprint(data, tokenizer, writers, seen.feature_shape, mixture),
            rows=_fingerprint(data, tokenizer, {TRAIN: train}, seen.feature_shape, mixture),
            samples=train.rows,
            validation_samples=sum(writer.rows for writer in writers.values()) - train.rows,
            sequence_length=data.sequence_length,
            tokenizer=tokenizer.fingerprint if tokenizer else None,
            token_dtype=self._dtype,
            vocabulary=_vocabulary(tokenizer, task) if tokenizer else None,
            feature_shape=seen.feature_shape or task.feature_shape,
            classes=max(seen.classes, len(self._names or ())) or None,
            class_names=self._names,
            label_tokens=train.label_tokens,
            truncated=seen.truncated,
            dropped=seen.dropped,
            skipped=seen.skipped,
            first_problem=seen.first_problem,
            longest=_longest(data, writers.values()),
            lengths=_lengths(self._folder / TRAIN, task, train.longest, [train.rows])[0],
            files=sizes(self._folder),
            arrays=arrays,
            origin=_origin(data),
            style=", ".join(dict.fromkeys(filter(None, styles))),
            evaluation={n: r for n, r in self._validation.items() if part_of_set(n) in writers},
            mixture=mixture,
            mixture_lengths=_lengths_of_each(self._folder / TRAIN, task, train.longest, mixture),
            sequences=task.sequences,
            masking=task.masking,
        )


def _vocabulary(tokenizer: Tokenizer, task: Task) -> int:
    """Ids that rows may have: those of the tokenizer, and a mask token beyond them."""
    mask = task.masking.mask if task.masking else None
    return max(tokenizer.vocabulary, 0 if mask is None else mask + 1)


def _origin(data: Data) -> str:
    paths = data.path if isinstance(data.path, list) else [data.path or ""]
    named = " ".join(data.sources()) or data.name or data.factory or " ".join(paths)
    return f"{data.source} {named}, {data.task}, {data.tokenizer}"


def _write_rows(
    source: _Source,
    tokenizer: Tokenizer | None,
    writers: Writers,
    seen: Seen,
    progress: Progress,
) -> None:
    write = write_stream if source.task.is_stream else write_samples
    if source.data.packs_documents:
        write = write_documents
    if tokenizer:
        source.task.use(tokenizer)

    def show(documents: int, written: int) -> None:
        progress(documents, written, source.reading.share())

    if not isinstance(tokenizer, HubTokenizer):
        write(source.task, tokenizer, source.rows, writers, seen, show)
        return
    ahead = TokenizeAhead(tokenizer)
    with contextlib.closing(ahead.rows(source.task, source.rows)) as rows:
        write(source.task, ahead, rows, writers, seen, show)


def _write_set(
    source: _Source,
    tokenizer: Tokenizer | None,
    writer: PartWriter,
    trained: Seen,
    progress: Progress,
) -> Seen:
    """Write all rows of an evaluation set; DataError where they do not go with those that are trained."""
    its = Seen(feature_shape=trained.feature_shape)
    _write_rows(source, tokenizer, {TRAIN: writer}, its, progress)
    if not writer.rows:
        raise DataError(f"data: {its.documents} documents gave no rows")
    refuse_other_outputs(source.task, trained, its)
    if its.classes > trained.classes:
        raise DataError(
            f"data: class {its.classes - 1}, and the training rows have classes 0 to {trained.classes - 1}"
        )
    return its


def _longest(data: Data, writers: Iterable[PartWriter]) -> int | None:
    """Input tokens of the longest row; None if rows are packed, or if only a task's own code knows."""
    return None if data.task_factory else max(writer.longest for writer in writers) or None


def _lengths(
    folder: Path, task: Task, longest: int, rows: Sequence[int]
) -> Sequence[list[int] | None]:
    """Input tokens at every hundredth of so many rows, of each source in turn.

    None where rows are packed or have no tokens.
    """
    if (task.is_stream and not task.data.packs_documents) or "lengths" not in task.columns:
        return [None] * len(rows)
    found = np.fromfile(folder / "lengths.bin", dtype=DTYPES["lengths"])
    inputs = found - (int(found.max()) - longest)  # the last token can be a target only
    parts = np.split(inputs, np.cumsum(rows)[:-1] * task.sequences)
    return [
        [int(size) for size in np.quantile(part, np.linspace(0, 1, 101), method="nearest")]
        for part in parts
    ]


def _lengths_of_each(
    folder: Path, task: Task, longest: int, mixture: dict[str, int]
) -> list[list[int]] | None:
    """`_lengths` of the sources of a mixture; None where there is none, or rows have no lengths."""
    found = _lengths(folder, task, longest, list(mixture.values())) if mixture else [None]
    return [own for own in found if own is not None] or None


def _fingerprint(
    data: Data,
    tokenizer: Tokenizer | None,
    writers: Writers,
    shape: list[int] | None,
    mixture: dict[str, int],
) -> str:
    identity = {
        "task": data.task,
        "sequence_length": data.sequence_length,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "feature_shape": shape,
        "parts": {part: writer.hash.hexdigest() for part, writer in writers.items()},
        **({"mixture": list(mixture.values())} if mixture else {}),
        **processor_digests(data),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{sources.source_label(data)}:{digest}"
