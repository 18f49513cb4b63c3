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
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from drumline.data.part_writer import Packer, PartWriter
from drumline.data.publish import locked, publish, remove_abandoned
from drumline.data.readers import Reading
from drumline.data.rows import DTYPES, array_columns
from drumline.data.source_row import SourceRow
from drumline.data.tasks import Encoded, Task, find_task
from drumline.data.tokenize_ahead import TokenizeAhead
from drumline.data.tokenizers import HubTokenizer, Tokenizer, find_tokenizer
from drumline.data.validation_split import TRAIN, VALIDATION, Placed, split_of
from drumline.errors import DataError
from drumline.files import apply_umask
from drumline.recipe.data_section import Data

_FEW_BAD_ROWS = 10
_MOST_BAD_ROWS = 0.01
"""With `on_bad_row: skip`, more bad rows than both are refused."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)

Progress = Callable[[int, int, float], None]
"""Called with documents read, tokens (or rows) written, and the share of the files that is read so far."""


def prepare(data: Data, project: str | None, progress: Progress | None = None) -> Path:
    """Return the folder of prepared rows, writing it if it does not exist yet."""
    final = cache.cache_folder(data, project)
    if read_dataset_manifest(final) is not None:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with locked(temporary):
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@dataclass
class _Seen:
    """Counts and shapes found while writing the rows."""

    documents: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    first_problem: str = ""
    rows: int = 0
    is_stream: bool = False
    classes: int = 0
    feature_shape: list[int] | None = None

    def skip(self, problem: str) -> None:
        """Count a bad row; DataError where they are more than a few."""
        self.skipped += 1
        self.first_problem = self.first_problem or problem
        if self.skipped > max(_FEW_BAD_ROWS, self.rows * _MOST_BAD_ROWS):
            raise DataError(
                f"data.on_bad_row: {self.skipped:,} of {self.rows:,} rows are bad, which is more than "
                f"{_MOST_BAD_ROWS:.0%}. The first: {self.first_problem}"
            )

    def add(self, other: "_Seen") -> None:
        """Add the counts of another source."""
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.skipped += other.skipped
        self.first_problem = self.first_problem or other.first_problem

    def note(self, sample: Encoded) -> None:
        """Count a sample; DataError where its features have another shape than earlier ones."""
        self.truncated += sample.was_truncated
        if sample.label is not None:
            self.classes = max(self.classes, sample.label + 1)
        if sample.features is not None:
            shape = list(sample.features.shape)
            self.feature_shape = self.feature_shape or shape
            if shape != self.feature_shape:
                raise DataError(f"features of shape {shape}, after rows of {self.feature_shape}")


Writers = dict[str, PartWriter]
Show = Callable[[int, int], None]


@dataclass
class _Source:
    """The rows of one source, and the task that encodes them."""

    data: Data
    task: Task
    rows: Iterator[SourceRow]
    reading: Reading


def _open(data: Data, project: str | None) -> _Source:
    reading = Reading(0)
    task, rows = find_task(data, project), sources.read(data, project, reading)
    first = next(rows, None)
    if first is None:
        raise DataError("data: the source has no rows")
    task.begin(first.fields)
    return _Source(data, task, itertools.chain([first], rows), reading)


def _write(data: Data, project: str | None, folder: Path, progress: Progress) -> None:
    source, seen = _open(data, project), _Seen()
    task, tokenizer = source.task, None
    if task.needs_tokenizer:
        tokenizer = find_tokenizer(
            data.tokenizer, data.bos, task.needs_end, data.special_tokens_in_text
        )
    dtype = None
    if tokenizer:
        dtype = "<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4"
    writers = {part: PartWriter(folder / part, dtype) for part in (TRAIN, VALIDATION)}
    _write_rows(source, tokenizer, writers, seen, progress)
    _refuse_empty(data, seen, writers)
    for name, own in data.evaluation_sets().items():
        part = part_of_set(name)
        writers[part] = PartWriter(folder / part, dtype)
        with cache.told_of(name):
            opened = _open(own, project)
            if opened.task.style != task.style:
                raise DataError(
                    f"data: its rows are {opened.task.style or 'prompts and completions'}, and the training "
                    f"rows are {task.style or 'prompts and completions'}"
                )
            if opened.task.columns != task.columns:
                raise DataError(
                    f"data: its rows have {', '.join(opened.task.columns)}, and the training rows have "
                    f"{', '.join(task.columns)}"
                )
            its = _write_set(opened, tokenizer, writers[part], seen, progress)
        seen.add(its)
    arrays = _one_dtype_each(writers)
    own_columns = [column for name in arrays for column in array_columns(name)]
    for writer in writers.values():
        writer.close([*task.columns, *own_columns])
    train = writers[TRAIN]
    DatasetManifest(
        task=data.task,
        fingerprint=_fingerprint(data, tokenizer, writers, seen.feature_shape),
        samples=train.rows,
        validation_samples=sum(writer.rows for writer in writers.values()) - train.rows,
        sequence_length=data.sequence_length,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        token_dtype=dtype,
        vocabulary=tokenizer.vocabulary if tokenizer else None,
        feature_shape=seen.feature_shape,
        classes=seen.classes or None,
        label_tokens=train.label_tokens,
        truncated=seen.truncated,
        dropped=seen.dropped,
        skipped=seen.skipped,
        first_problem=seen.first_problem,
        longest=_longest(data, writers.values()),
        lengths=_lengths(folder / TRAIN, task, train.longest),
        files=sizes(folder),
        arrays=arrays,
        origin=_origin(data),
        style=task.style,
        evaluation={name: writers[part_of_set(name)].rows for name in data.evaluation or ()},
    ).write(folder)


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
    return f"{data.source} {data.name or data.factory or ' '.join(paths)}, {data.task}, {data.tokenizer}"


def _write_rows(
    source: _Source,
    tokenizer: Tokenizer | None,
    writers: Writers,
    seen: _Seen,
    progress: Progress,
) -> None:
    write = _write_stream if source.task.is_stream else _write_samples
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
    trained: _Seen,
    progress: Progress,
) -> _Seen:
    """Write all rows of an evaluation set; DataError where they do not go with those that are trained."""
    its = _Seen(feature_shape=trained.feature_shape)
    _write_rows(source, tokenizer, {TRAIN: writer}, its, progress)
    if not writer.rows:
        raise DataError(f"data: {its.documents} documents gave no rows")
    if its.classes > trained.classes:
        raise DataError(
            f"data: class {its.classes - 1}, and the training rows have classes 0 to {trained.classes - 1}"
        )
    return its


def _longest(data: Data, writers: Iterable[PartWriter]) -> int | None:
    """Input tokens of the longest row; None if rows are packed, or if only a task's own code knows."""
    return None if data.task_factory else max(writer.longest for writer in writers) or None


def _lengths(folder: Path, task: Task, longest: int) -> list[int] | None:
    """Input tokens of rows at every hundredth of them; None where rows are packed or have no tokens."""
    if task.is_stream or "lengths" not in task.columns:
        return None
    found = np.fromfile(folder / "lengths.bin", dtype=DTYPES["lengths"])
    inputs = found - (int(found.max()) - longest)  # the last token can be a target only
    return [int(size) for size in np.quantile(inputs, np.linspace(0, 1, 101), method="nearest")]


def _write_stream(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    seen: _Seen,
    show: Show,
) -> None:
    """Pack documents into rows, each with the begin token, if there is one, and the end token.

    A document may span several source rows.
    """
    assert tokenizer and tokenizer.end is not None
    seen.is_stream = True
    begin = np.array([] if tokenizer.begin is None else [tokenizer.begin], dtype=np.uint32)
    begins = True
    length = task.data.sequence_length
    assert length
    split, written, most = split_of(task.data), 0, _most(task.data)
    packers = {
        part: Packer(writer, length, most if part == TRAIN else None)
        for part, writer in writers.items()
    }
    for row in rows:
        piece = _encoded(task, row, tokenizer, seen)
        if piece is None or piece.tokens is None:
            continue
        tokens = np.append(piece.tokens, np.uint32(tokenizer.end)) if row.ends else piece.tokens
        if begins and begin.size:
            tokens = np.concatenate([begin, tokens])
        begins = row.ends
        packers[split.part_of(seen.documents)].add(tokens)
        seen.documents += row.ends
        written += len(tokens)
        show(seen.documents, written)
        if most is not None and writers[TRAIN].tokens > most * length:
            seen.documents += not row.ends  # the rest of it is not read
            break
    for packer in packers.values():
        packer.finish()


def _most(data: Data) -> int | None:
    """Training rows after which reading stops; None where recorded runs have always read all rows."""
    return None if data.validation_split == "periodic" else data.samples


def _write_samples(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    seen: _Seen,
    show: Show,
) -> None:
    """Write one sample per source row; rows without a target are dropped and counted."""
    split, most = split_of(task.data), _most(task.data)

    def append(placed: Placed) -> None:
        for part, sample in placed:
            if part != TRAIN or writers[part].rows != most:
                writers[part].append_sample(sample)

    for row in rows:
        skipped = seen.skipped
        sample = _encoded(task, row, tokenizer, seen)
        if seen.skipped > skipped:
            continue
        if sample is None or sample.count <= 0:
            seen.dropped += 1
        else:
            append(split.place(seen.documents, sample))
        seen.documents += 1
        show(seen.documents, seen.documents)
        if writers[TRAIN].rows == most:
            return
    append(split.finish())


def _encoded(
    task: Task, row: SourceRow, tokenizer: Tokenizer | None, seen: _Seen
) -> Encoded | None:
    """The sample of a row, counted in `seen`.

    A bad row is skipped and counted where `data.on_bad_row` says so; else a DataError says where it stands.
    """
    seen.rows += 1
    try:
        if row.problem:
            raise DataError(row.problem)
        sample = task.encode(row.fields, tokenizer)
        if sample is not None:
            seen.note(sample)
    except DataError as error:
        problem = f"{row.where}: {error}"
        if task.data.on_bad_row == "stop":
            raise DataError(f"data: {problem}") from None
        seen.skip(problem)
        return None
    return sample


def _refuse_empty(data: Data, seen: _Seen, writers: Writers) -> None:
    documents = seen.documents
    if data.validation_split == "drawn" and writers[TRAIN].rows and not seen.is_stream:
        documents = writers[TRAIN].rows + writers[VALIDATION].rows
    if documents == 0 or writers[TRAIN].rows == 0:
        why = ""
        if seen.dropped:
            why = f": {seen.dropped} have no target within sequence_length {data.sequence_length}"
        raise DataError(f"data: {documents} documents gave no training rows{why}")
    if data.validation and writers[VALIDATION].rows == 0:
        scale = 10 ** (len(str(documents)) + 1)
        enough = math.ceil(scale / documents) / scale  # rounded up
        fix = f"validation {enough:g} (one document)" if documents > 1 else "validation 0"
        raise DataError(
            f"data.validation: {data.validation} × {documents} documents = "
            f"{data.validation * documents:.2g}, which is none. Nearest: {fix}"
        )


def _fingerprint(
    data: Data, tokenizer: Tokenizer | None, writers: Writers, shape: list[int] | None
) -> str:
    identity = {
        "task": data.task,
        "sequence_length": data.sequence_length,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "feature_shape": shape,
        "parts": {part: writer.hash.hexdigest() for part, writer in writers.items()},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{sources.source_label(data)}:{digest}"
