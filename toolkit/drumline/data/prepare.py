"""Tokenises, packs and fingerprints data once; later runs memory-map the result.

Rows are written to a locked temporary folder, which one rename publishes under its key. So a killed prepare
leaves no partial result, and of two concurrent ones the first to finish publishes.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drumline.data import cache, sources
from drumline.data.dataset_manifest import (
    DatasetManifest,
    part_of_set,
    read_dataset_manifest,
    sizes,
)
from drumline.data.files import classes_of
from drumline.data.media import MediaFiles, has_media
from drumline.data.part_writer import PartWriter
from drumline.data.processors import processor_digests
from drumline.data.publish import hidden_folder, locked, publish, remove_abandoned
from drumline.data.readers import Reading
from drumline.data.rows import DTYPES, Rows, array_columns
from drumline.data.source_row import SourceRow
from drumline.data.tasks import Task, find_task
from drumline.data.tasks.base import FILE
from drumline.data.tokenize_ahead import TokenizeAhead
from drumline.data.tokenizers import HubTokenizer, Tokenizer, find_tokenizer
from drumline.data.validation_split import TRAIN, VALIDATION
from drumline.data.write_rows import Seen, Writers, write_documents, write_samples, write_stream
from drumline.errors import DataError
from drumline.files import apply_umask
from drumline.recipe.data_section import Data

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)

Progress = Callable[[int, int, float], None]
"""Called with documents read, tokens (or rows) written, and the share of the files that is read so far."""


def prepare(data: Data, project: str | None, progress: Progress | None = None) -> Path:
    """Return the folder of prepared rows, writing it if it does not exist yet."""
    final = cache.cache_folder(data, project)
    if read_dataset_manifest(final) is not None:
        if not _has_changed(data, project, final):
            return final
        with hidden_folder(final) as aside:
            final.rename(aside / "old")
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    try:
        with hidden_folder(final) as temporary, locked(temporary):
            _write(data, project, temporary, progress or (lambda documents, tokens, share: None))
            apply_umask(temporary, 0o777)
            publish(temporary, final)
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(str(final.parent))
        if elsewhere or error.errno not in _DISK_ERRORS:
            raise
        raise DataError(
            f"{final.parent}: cannot write the prepared rows: {error.strerror or error}. Nearest: "
            "make room, or point DRUMLINE_CACHE at another folder"
        ) from None
    return final


def _has_changed(data: Data, project: str | None, folder: Path) -> bool:
    """Whether a data set of the project has other samples than when it was prepared, by those seen then.

    Or whether an image or a recording that rows name is another file.
    """
    if has_media(data):
        return MediaFiles.have_changed(folder)
    if not data.is_map_style:
        return False
    parts = {TRAIN: data} | {part_of_set(name): own for name, own in data.evaluation_sets().items()}
    for part, own in parts.items():
        rows = Rows(folder, part, find_task(own, project))
        if not rows.task.still_holds(rows):  # type: ignore[attr-defined]
            return True
    return False


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


def _write(data: Data, project: str | None, folder: Path, progress: Progress) -> None:
    seen, opened, media = Seen(), {}, MediaFiles()
    names = _class_names(data)
    for label, own in data.sources().items():
        with cache.told_of(cache.key_of_source(data, label)):
            opened[label] = _open(own, project, names, media)
    task, tokenizer = next(iter(opened.values())).task, None
    if task.needs_tokenizer:
        tokenizer = find_tokenizer(
            data.tokenizer, data.bos, task.needs_end, data.special_tokens_in_text
        )
    dtype = None
    if tokenizer:
        dtype = "<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4"
    train = PartWriter(folder / TRAIN, dtype)
    writers = {TRAIN: train}
    mixture: dict[str, int] = {}
    validation: dict[str, int] = {}
    for label, source in opened.items():
        before, parts = train.rows, {TRAIN: train}
        if data.validation or not label:
            part = part_of_set(label) if label else VALIDATION
            parts[VALIDATION] = writers[part] = PartWriter(folder / part, dtype)
        with cache.told_of(cache.key_of_source(data, label)):
            _refuse_others(task, source.task)
            its = Seen(feature_shape=seen.feature_shape)
            _write_rows(source, tokenizer, parts, its, progress)
            source.task.check()
            _refuse_other_outputs(task, seen, its)
            held_out = parts[VALIDATION].rows if VALIDATION in parts else 0
            _refuse_empty(source.data, its, train.rows - before, held_out)
        seen.join(its)
        mixture[label], validation[label] = train.rows - before, held_out
    for name, own in data.evaluation_sets().items():
        part = part_of_set(name)
        writers[part] = PartWriter(folder / part, dtype)
        with cache.told_of(cache.key_of_set(name)):
            source = _open(own, project, names, media)
            _refuse_others(task, source.task)
            seen.add(_write_set(source, tokenizer, writers[part], seen, progress))
        validation[name] = writers[part].rows
    validation = {name: rows for name, rows in validation.items() if part_of_set(name) in writers}
    mixture = mixture if data.mixture else {}
    _refuse_few(task, writers)
    if data.is_chat_with_images and FILE not in train.arrays:
        raise DataError(
            "data.image: no training row has an image. Nearest: data.image_field, the column with the images"
        )
    arrays = _one_dtype_each(writers)
    own_columns = [column for name in arrays for column in array_columns(name)]
    for writer in writers.values():
        writer.close([*task.columns, *own_columns])
    if has_media(data):
        media.write(folder)
    DatasetManifest(
        task=data.task,
        fingerprint=_fingerprint(data, tokenizer, writers, seen.feature_shape, mixture),
        rows=_fingerprint(data, tokenizer, {TRAIN: train}, seen.feature_shape, mixture),
        samples=train.rows,
        validation_samples=sum(writer.rows for writer in writers.values()) - train.rows,
        sequence_length=data.sequence_length,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        token_dtype=dtype,
        vocabulary=_vocabulary(tokenizer, task) if tokenizer else None,
        feature_shape=seen.feature_shape or task.feature_shape,
        classes=max(seen.classes, len(names or ())) or None,
        class_names=names,
        label_tokens=train.label_tokens,
        truncated=seen.truncated,
        dropped=seen.dropped,
        skipped=seen.skipped,
        first_problem=seen.first_problem,
        longest=_longest(data, writers.values()),
        lengths=_lengths(folder / TRAIN, task, train.longest, [train.rows])[0],
        files=sizes(folder),
        arrays=arrays,
        origin=_origin(data),
        style=", ".join(dict.fromkeys(filter(None, (s.task.style for s in opened.values())))),
        evaluation=validation,
        mixture=mixture,
        mixture_lengths=_lengths_of_each(folder / TRAIN, task, train.longest, mixture),
        sequences=task.sequences,
        masking=task.masking,
    ).write(folder)


def _refuse_others(task: Task, other: Task) -> None:
    """DataError where the rows of two sources cannot lie side by side: chats and pairs, or other columns."""
    if any(getattr(other, key) != getattr(task, key) for key in ("sequences", "is_chat")):
        raise DataError(
            f"data: its rows are {other.style or 'prompts and completions'}, and the training rows are "
            f"{task.style or 'prompts and completions'}"
        )
    if other.columns != task.columns:
        raise DataError(
            f"data: its rows have {', '.join(other.columns)}, and the training rows have "
            f"{', '.join(task.columns)}"
        )


def _vocabulary(tokenizer: Tokenizer, task: Task) -> int:
    """Ids that rows may have: those of the tokenizer, and a mask token beyond them."""
    mask = task.masking.mask if task.masking else None
    return max(tokenizer.vocabulary, 0 if mask is None else mask + 1)


def _refuse_few(task: Task, writers: Writers) -> None:
    """DataError where a part has rows, but not as many as the task needs."""
    for part, writer in writers.items():
        if 0 < writer.rows < task.fewest_rows:
            raise DataError(
                f"data: {writer.rows} of at least {task.fewest_rows} rows in {part}: each is compared with "
                "another's completion. Nearest: more rows, or another data.validation"
            )


def _refuse_other_outputs(task: Task, trained: Seen, its: Seen) -> None:
    """DataError where rows of a source have labels for another number of outputs than those before."""
    if task.has_fixed_outputs and trained.classes and its.classes != trained.classes:
        raise DataError(
            f"data.label_field: {its.classes} numbers a row, and the training rows have {trained.classes}"
        )


def _one_dtype_each(writers: Writers) -> dict[str, str]:
    """The dtype of every array of a custom task; DataError where two parts have different ones."""
    found: dict[str, str] = {}
    for part, writer in writers.items():
        for name, kind in writer.arrays.items():
            if found.setdefault(name, kind) != kind:
                raise DataError(
                    f"data.task_factory: array {name!r} is {kind} in {part}, after rows of {found[name]}"
                )
    return found


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
    _refuse_other_outputs(source.task, trained, its)
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


def _refuse_empty(data: Data, seen: Seen, trained: int, held_out: int) -> None:
    """DataError where a source gave no training row (`trained`), or none for validation (`held_out`)."""
    documents = seen.documents
    if data.validation_split == "drawn" and trained and not seen.is_stream:
        documents = trained + held_out
    if documents == 0 or trained == 0:
        why = ""
        if seen.dropped:
            why = f": {seen.dropped} have no target within sequence_length {data.sequence_length}"
        raise DataError(f"data: {documents} documents gave no training rows{why}")
    if data.validation and held_out == 0:
        scale = 10 ** (len(str(documents)) + 1)
        enough = math.ceil(scale / documents) / scale  # rounded up
        fix = f"validation {enough:g} (one document)" if documents > 1 else "validation 0"
        raise DataError(
            f"data.validation: {data.validation} × {documents} documents = "
            f"{data.validation * documents:.2g}, which is none. Nearest: {fix}"
        )


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
