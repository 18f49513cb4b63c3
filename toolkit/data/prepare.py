"""Tokenise, pack and fingerprint once; every later run maps the result.

The rows are written into a locked temporary folder and appear under their key by one rename, so a
killed prepare leaves no half cache and two at once do not collide: the first to finish wins.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from toolkit.data import cache, sources
from toolkit.data.card import CARD_VERSION, Card, read_card, sizes
from toolkit.data.rows import DTYPES
from toolkit.data.tokenizers import Tokenizer, Tokens, find_tokenizer
from toolkit.errors import DataError
from toolkit.recipe.schema import Data

_ROWS_AT_ONCE = 1 << 16
_ABANDONED_AFTER_S = 60.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)

Progress = Callable[[int, int], None]
"""Called with documents read and tokens (or rows) written so far."""


def prepare(data: Data, project: str | None, progress: Progress | None = None) -> Path:
    """The folder of prepared rows, made if it is not there yet."""
    final = cache.cache_folder(data, project)
    if read_card(final) is not None:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with _locked(temporary):
            _write(data, project, temporary, progress or (lambda documents, tokens: None))
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


class _Writer:
    """Appends rows of one part and hashes them; holds nothing but what it is given."""

    def __init__(self, folder: Path, token_dtype: str | None) -> None:
        folder.mkdir()
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._dtypes = {**DTYPES, "tokens": token_dtype}
        self.hash = hashlib.sha256()
        self.rows = 0
        self.tokens = 0
        self.label_tokens = 0

    def append(self, **columns: Any) -> None:
        """One value, or an array of them, to each named column."""
        for name, value in columns.items():
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
            raw = np.asarray(value, dtype=self._dtypes[name]).tobytes()
            self._files[name].write(raw)
            self.hash.update(name.encode() + raw)
        if "counts" in columns:
            self.rows += int(np.size(columns["counts"]))
            self.label_tokens += int(np.sum(columns["counts"]))

    def close(self, names: list[str]) -> None:
        """Flush to disk; columns that got no row become empty files."""
        for name in names:
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


class _Packer:
    """Documents end to end in one stream; a row every `length` tokens, plus the next as target.

    Every token but the first is a target exactly once; the last row may be shorter.
    """

    def __init__(self, writer: _Writer, length: int) -> None:
        self._writer, self._length = writer, length

    def add(self, tokens: Tokens) -> None:
        """Append a document's tokens."""
        self._writer.append(tokens=tokens)
        self._writer.tokens += len(tokens)

    def finish(self) -> None:
        """Cut the stream into rows."""
        targets = self._writer.tokens - 1
        rows = -(-max(0, targets) // self._length)
        for first in range(0, rows, _ROWS_AT_ONCE):
            starts = np.arange(first, min(rows, first + _ROWS_AT_ONCE)) * self._length
            counts = np.minimum(self._length, targets - starts)
            self._writer.append(
                starts=starts, lengths=counts + 1, skipped=np.zeros_like(counts), counts=counts
            )


def _write(data: Data, project: str | None, folder: Path, progress: Progress) -> None:
    tokenizer, columns, rows = _layout(data, sources.read(data, project))
    dtype = None
    if tokenizer:
        dtype = "<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4"
    writers = {part: _Writer(folder / part, dtype) for part in ("train", "validation")}
    facts: dict[str, Any] = {"truncated": 0, "dropped": 0, "classes": 0, "feature_shape": None}
    if data.task == "causal_lm":
        assert tokenizer
        documents = _pack(data, tokenizer, rows, writers, progress)
    else:
        documents = _append_rows(data, tokenizer, rows, writers, facts, progress)
    _refuse_empty(data, documents, writers)
    for writer in writers.values():
        writer.close(columns)
    classes = facts["classes"] or None
    train, validation = writers["train"], writers["validation"]
    Card(
        version=CARD_VERSION,
        task=data.task,
        fingerprint=_fingerprint(data, tokenizer, writers, facts["feature_shape"]),
        samples=train.rows,
        validation_samples=validation.rows,
        sequence_length=data.sequence_length,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        token_dtype=dtype,
        vocabulary=tokenizer.vocabulary if tokenizer else None,
        feature_shape=facts["feature_shape"],
        classes=classes,
        label_tokens=train.label_tokens,
        truncated=facts["truncated"],
        dropped=facts["dropped"],
        files=sizes(folder),
    ).write(folder)


def _layout(
    data: Data, rows: Iterator[dict[str, Any]]
) -> tuple[Tokenizer | None, list[str], Iterator[dict[str, Any]]]:
    """Tokenizer and columns for the task; classification looks at the first row to tell which."""
    if data.task != "classification":
        columns = ["tokens", "starts", "lengths", "skipped", "counts"]
        return find_tokenizer(data.tokenizer), columns, rows
    first = next(rows, None)
    if first is None:
        raise DataError("data: the source has no rows")
    if "features" in first:
        return None, ["features", "labels", "counts"], _chain(first, rows)
    columns = ["tokens", "starts", "lengths", "labels", "counts"]
    return find_tokenizer(data.tokenizer), columns, _chain(first, rows)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _part_of(document: int, validation: Fraction) -> str:
    """Every 1/validation-th document is for validation: floor(n × validation) of any first n."""
    before, after = int(document * validation), int((document + 1) * validation)
    return "validation" if after > before else "train"


def _pack(
    data: Data,
    tokenizer: Tokenizer,
    rows: Iterator[dict[str, Any]],
    writers: dict[str, _Writer],
    progress: Progress,
) -> int:
    assert data.sequence_length
    share = Fraction(str(data.validation))
    packers = {part: _Packer(writer, data.sequence_length) for part, writer in writers.items()}
    documents = written = 0
    for row in rows:
        text = _field(row, data.text_field, "text_field")
        part = _part_of(documents, share)
        tokens = tokenizer.encode(text)
        if row.get("ends", True):
            tokens = np.append(tokens, np.uint32(tokenizer.end))
            documents += 1
        packers[part].add(tokens)
        written += len(tokens)
        progress(documents, written)
    for packer in packers.values():
        packer.finish()
    return documents


def _append_rows(
    data: Data,
    tokenizer: Tokenizer | None,
    rows: Iterator[dict[str, Any]],
    writers: dict[str, _Writer],
    facts: dict[str, Any],
    progress: Progress,
) -> int:
    """One document, one row: sft and classification."""
    share = Fraction(str(data.validation))
    documents = 0
    for row in rows:
        writer = writers[_part_of(documents, share)]
        if tokenizer is None:
            _append_features(data, row, writer, facts)
        elif data.task == "sft":
            _append_sft(data, tokenizer, row, writer, facts)
        else:
            _append_labelled_text(data, tokenizer, row, writer, facts)
        documents += 1
        progress(documents, documents)
    return documents


def _append_features(
    data: Data, row: dict[str, Any], writer: _Writer, facts: dict[str, Any]
) -> None:
    try:
        values = np.asarray(row["features"], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"data: row {writer.rows + 1}: features: {error}") from None
    if values.size == 0 or not np.isfinite(values).all():
        raise DataError(f"data: row {writer.rows + 1}: features are empty or not finite")
    if facts["feature_shape"] is None:
        facts["feature_shape"] = list(values.shape)
    if list(values.shape) != facts["feature_shape"]:
        raise DataError(
            f"data: features of shape {list(values.shape)}, after rows of {facts['feature_shape']}"
        )
    writer.append(features=values, labels=_label(data, row, facts), counts=1)


def _append_sft(
    data: Data, tokenizer: Tokenizer, row: dict[str, Any], writer: _Writer, facts: dict[str, Any]
) -> None:
    """Prompt and completion; only the completion's tokens (and the end) are targets."""
    assert data.sequence_length
    prompt = tokenizer.encode(_field(row, data.prompt_field, "prompt_field"))
    completion = tokenizer.encode(_field(row, data.completion_field, "completion_field"))
    tokens = np.concatenate([prompt, completion, [np.uint32(tokenizer.end)]])
    facts["truncated"] += len(tokens) > data.sequence_length + 1
    tokens = tokens[: data.sequence_length + 1]
    skipped = max(0, len(prompt) - 1)
    count = len(tokens) - 1 - skipped
    if count <= 0:
        facts["dropped"] += 1
        return
    writer.append(
        tokens=tokens, starts=writer.tokens, lengths=len(tokens), skipped=skipped, counts=count
    )
    writer.tokens += len(tokens)


def _append_labelled_text(
    data: Data, tokenizer: Tokenizer, row: dict[str, Any], writer: _Writer, facts: dict[str, Any]
) -> None:
    tokens = tokenizer.encode(_field(row, data.text_field, "text_field"))
    limit = data.sequence_length or len(tokens)
    facts["truncated"] += len(tokens) > limit
    tokens = tokens[:limit]
    if not len(tokens):
        facts["dropped"] += 1
        return
    label = _label(data, row, facts)
    writer.append(tokens=tokens, starts=writer.tokens, lengths=len(tokens), labels=label, counts=1)
    writer.tokens += len(tokens)


def _label(data: Data, row: dict[str, Any], facts: dict[str, Any]) -> int:
    value = row.get(data.label_field)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise DataError(
            f"data.label_field: {data.label_field}: {value!r} is not a class number ≥ 0"
        )
    facts["classes"] = max(facts["classes"], int(value) + 1)
    return int(value)


def _field(row: dict[str, Any], name: str, key: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        columns = ", ".join(str(column) for column in row if column != "ends")
        found = f"a {type(value).__name__}" if name in row else f"this row has: {columns}"
        raise DataError(f"data.{key}: no text in column {name!r}; {found}")
    return value


def _refuse_empty(data: Data, documents: int, writers: dict[str, _Writer]) -> None:
    if documents == 0 or writers["train"].rows == 0:
        raise DataError(f"data: {documents} documents gave no training rows")
    if data.validation and writers["validation"].rows == 0:
        fix = f"validation {1 / documents:.2g} (one document)" if documents > 1 else "validation 0"
        raise DataError(
            f"data.validation: {data.validation} × {documents} documents = "
            f"{data.validation * documents:.2g}, which is none. Nearest: {fix}"
        )


def _fingerprint(
    data: Data, tokenizer: Tokenizer | None, writers: dict[str, _Writer], shape: list[int] | None
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
    """Hold the temporary folder's lock for as long as this process lives."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(temporary: Path, final: Path) -> None:
    """One rename; where another process was first, its rows are the same."""
    (temporary / ".lock").unlink()
    try:
        temporary.rename(final)
    except OSError:
        if read_card(final) is None:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)


def _remove_abandoned(final: Path) -> None:
    """Temporary folders of this key whose process is gone."""
    for folder in final.parent.glob(f".{final.name}.*"):
        lock = folder / ".lock"
        with contextlib.suppress(OSError), lock.open("r") as file:
            if time.time() - folder.stat().st_mtime < _ABANDONED_AFTER_S:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
