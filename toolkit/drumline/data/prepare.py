"""Tokenises, packs and fingerprints data once; later runs memory-map the result.

Rows are written to a locked temporary folder, which one rename publishes under its key. So a killed prepare
leaves no partial result, and of two concurrent ones the first to finish publishes.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from drumline.data import cache, sources
from drumline.data.dataset_manifest import DatasetManifest, not_ours, read_dataset_manifest, sizes
from drumline.data.part_writer import Packer, PartWriter
from drumline.data.rows import array_columns
from drumline.data.source_row import SourceRow
from drumline.data.tasks import Encoded, Task, find_task
from drumline.data.tokenizers import Tokenizer, find_tokenizer
from drumline.errors import DataError
from drumline.files import apply_umask
from drumline.recipe.schema import Data

_FEW_BAD_ROWS = 10
_MOST_BAD_ROWS = 0.01
"""With `on_bad_row: skip`, more bad rows than both are refused."""
_ABANDONED_AFTER_S = 60.0
_JUST_MADE_S = 2.0
"""A process may have made its lock file and not taken the lock yet."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)

Progress = Callable[[int, int], None]
"""Called with documents read and tokens (or rows) written so far."""


def prepare(data: Data, project: str | None, progress: Progress | None = None) -> Path:
    """Return the folder of prepared rows, writing it if it does not exist yet."""
    final = cache.cache_folder(data, project)
    if read_dataset_manifest(final) is not None:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with _locked(temporary):
            _write(data, project, temporary, progress or (lambda documents, tokens: None))
            apply_umask(temporary, 0o777)
            _publish(temporary, final)
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


def _write(data: Data, project: str | None, folder: Path, progress: Progress) -> None:
    task = find_task(data, project)
    rows = sources.read(data, project)
    first = next(rows, None)
    if first is None:
        raise DataError("data: the source has no rows")
    task.begin(first.fields)
    tokenizer = (
        find_tokenizer(data.tokenizer, data.bos, task.needs_end) if task.needs_tokenizer else None
    )
    dtype = None
    if tokenizer:
        dtype = "<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4"
    writers = {part: PartWriter(folder / part, dtype) for part in ("train", "validation")}
    write = _write_stream if task.is_stream else _write_samples
    seen = write(task, tokenizer, itertools.chain([first], rows), writers, progress)
    _refuse_empty(data, seen, writers)
    train, validation = writers["train"], writers["validation"]
    arrays = train.arrays | validation.arrays
    own = [column for name in arrays for column in array_columns(name)]
    for writer in writers.values():
        writer.close([*task.columns, *own])
    DatasetManifest(
        task=data.task,
        fingerprint=_fingerprint(data, tokenizer, writers, seen.feature_shape),
        samples=train.rows,
        validation_samples=validation.rows,
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
        files=sizes(folder),
        arrays=arrays,
    ).write(folder)


def _longest(data: Data, writers: Iterable[PartWriter]) -> int | None:
    """Input tokens of the longest row; None if rows are packed, or if only a task's own code knows."""
    return None if data.task_factory else max(writer.longest for writer in writers) or None


def _part_of(document: int, validation: Fraction) -> str:
    """The part of a document: of the first n documents, floor(n × validation) are for validation."""
    before, after = int(document * validation), int((document + 1) * validation)
    return "validation" if after > before else "train"


def _write_stream(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    progress: Progress,
) -> _Seen:
    """Pack documents into rows, each with the begin token, if there is one, and the end token.

    A document may span several source rows.
    """
    assert tokenizer and tokenizer.end is not None
    begin = np.array([] if tokenizer.begin is None else [tokenizer.begin], dtype=np.uint32)
    begins = True
    length = task.data.sequence_length
    assert length
    share, seen, written = Fraction(str(task.data.validation)), _Seen(), 0
    packers = {part: Packer(writer, length) for part, writer in writers.items()}
    for row in rows:
        piece = _encoded(task, row, tokenizer, seen)
        if piece is None or piece.tokens is None:
            continue
        tokens = np.append(piece.tokens, np.uint32(tokenizer.end)) if row.ends else piece.tokens
        if begins and begin.size:
            tokens = np.concatenate([begin, tokens])
        begins = row.ends
        packers[_part_of(seen.documents, share)].add(tokens)
        seen.documents += row.ends
        written += len(tokens)
        progress(seen.documents, written)
    for packer in packers.values():
        packer.finish()
    return seen


def _write_samples(
    task: Task,
    tokenizer: Tokenizer | None,
    rows: Iterable[SourceRow],
    writers: Writers,
    progress: Progress,
) -> _Seen:
    """Write one sample per source row; rows without a target are dropped and counted."""
    share, seen = Fraction(str(task.data.validation)), _Seen()
    for row in rows:
        writer = writers[_part_of(seen.documents, share)]
        skipped = seen.skipped
        sample = _encoded(task, row, tokenizer, seen)
        if seen.skipped > skipped:
            continue
        if sample is None or sample.count <= 0:
            seen.dropped += 1
        else:
            writer.append_sample(sample)
        seen.documents += 1
        progress(seen.documents, seen.documents)
    return seen


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
    if documents == 0 or writers["train"].rows == 0:
        why = ""
        if seen.dropped:
            why = f": {seen.dropped} have no target within sequence_length {data.sequence_length}"
        raise DataError(f"data: {documents} documents gave no training rows{why}")
    if data.validation and writers["validation"].rows == 0:
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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context that holds the temporary folder's lock; it is also released if the process dies."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(temporary: Path, final: Path) -> None:
    """Publish the folder by one rename; rows that another process published first are kept."""
    (temporary / ".lock").unlink()
    try:
        temporary.rename(final)
    except OSError:
        if read_dataset_manifest(final) is None:
            shutil.rmtree(final, ignore_errors=True)
            try:
                temporary.rename(final)
            except OSError:
                raise DataError(not_ours(final)) from None


def _remove_abandoned(final: Path) -> None:
    """Delete temporary folders whose process has ended: their lock is free, or was never made."""
    for folder in final.parent.glob(".*.*"):
        with contextlib.suppress(OSError):
            age_s = time.time() - folder.stat().st_mtime
            if age_s < (_JUST_MADE_S if (folder / ".lock").exists() else _ABANDONED_AFTER_S):
                continue
            with contextlib.suppress(FileNotFoundError), (folder / ".lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
