"""Reads rows of local files: text, JSON, CSV, TSV and Parquet, also compressed; text stays as it was written.

Every error names the file and the line or row. Nothing guesses types: what a CSV holds is text.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from drumline.data.builtin import text_blocks
from drumline.data.files import DataFile, format_of
from drumline.data.remote import RemoteFile
from drumline.data.source_row import SourceRow
from drumline.errors import DataError

_ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
_LARGEST_FIELD = 1 << 30
_ROWS_AT_ONCE = 1024
_TABS = {"csv": ",", "tsv": "\t"}


@dataclass
class Reading:
    """How far the files of a source have been read: `total` bytes of all, `done` of those that are read."""

    total: int
    done: int = 0
    raw: IO[bytes] | None = None

    def share(self) -> float:
        """The share of the bytes that are read, from 0 to 1."""
        now = 0 if self.raw is None or self.raw.closed else self.raw.tell()
        return min(1.0, (self.done + now) / max(1, self.total))


def read_file(path: DataFile, reading: Reading | None = None) -> Iterator[SourceRow]:
    """The rows of one file; a text file is one document.

    A row that cannot be read has a `problem`. DataError for a file that is not what it says.
    """
    kind = format_of(path)
    assert kind
    try:
        yield from _READERS[kind](path, reading or Reading(1))
    except UnicodeDecodeError as error:
        raise DataError(f"data.path: {path} is not UTF-8 text (near byte {error.start})") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"data.path: {path} cannot be read: {error}") from None
    except Exception as error:  # each remote file system has its own
        if isinstance(error, DataError) or not isinstance(path, RemoteFile):
            raise
        raise DataError(
            f"data.path: {path} cannot be read: {type(error).__name__}: {error}"
        ) from None


def _text(path: DataFile, reading: Reading) -> Iterator[SourceRow]:
    """One document."""
    with _opened(path, reading) as file:
        yield from text_blocks(file, str(path))


def _json_lines(path: DataFile, reading: Reading) -> Iterator[SourceRow]:
    with _opened(path, reading) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_row(line, f"{path}, line {number:,}")


def _json(path: DataFile, reading: Reading) -> Iterator[SourceRow]:
    """A list of objects, or an object a line."""
    with _opened(path, reading) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    if first != "[":
        yield from _json_lines(path, reading)
        return
    with _opened(path, reading) as file:
        try:
            rows = _parsed(file.read())
        except ValueError as error:
            raise DataError(f"data.path: {path}: {error}") from None
    for number, row in enumerate(rows, 1):
        yield _mapping(row, f"{path}, row {number:,}")


def _json_row(line: str, where: str) -> SourceRow:
    try:
        return _mapping(_parsed(line), where)
    except ValueError as error:
        return SourceRow({}, where, problem=str(error))


def _parsed(text: str) -> Any:
    """The value of a JSON text; ValueError for what is none."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("not JSON that can be read: too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _mapping(row: Any, where: str) -> SourceRow:
    if isinstance(row, dict):
        return SourceRow(row, where)
    problem = f"a row is an object with named fields, not {row!r:.60}"
    return SourceRow({}, where, problem=problem)


def _table(path: DataFile, reading: Reading) -> Iterator[SourceRow]:
    csv.field_size_limit(_LARGEST_FIELD)
    kind = format_of(path)
    assert kind
    with _opened(path, reading) as file:
        lines = csv.reader(file, delimiter=_TABS[kind], strict=True)
        try:
            header = next(lines, [])
            _refuse_twins(header, f"{path}, line 1")
            for values in lines:
                where = f"{path}, line {lines.line_num:,}"
                if not values:  # an empty line
                    continue
                if len(values) != len(header):
                    mark = "tab" if kind == "tsv" else "comma"
                    problem = (
                        f"{len(values)} fields, and the header has {len(header)}. "
                        f"Nearest: quote a field that holds a {mark}, and end no line with one"
                    )
                    yield SourceRow({}, where, problem=problem)
                    continue
                yield SourceRow(dict(zip(header, values, strict=True)), where)
        except csv.Error as error:
            raise DataError(f"data.path: {path}, line {lines.line_num:,}: {error}") from None


def _parquet(path: DataFile, reading: Reading) -> Iterator[SourceRow]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"data.path: {path}: Parquet files need the package `pyarrow`") from None
    number = 0
    try:
        source = path.open("rb") if isinstance(path, RemoteFile) else path
        with parquet.ParquetFile(source) as file:
            _refuse_twins(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(row, f"{path}, row {number:,}")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"data.path: {path} cannot be read as parquet: {error}") from None


def _refuse_twins(names: list[str], where: str) -> None:
    twice, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise DataError(
            f"data.path: {where}: {times} columns are named {twice!r}. Nearest: rename one"
        )


_READERS: dict[str, Callable[[DataFile, Reading], Iterator[SourceRow]]] = {
    "text": _text,
    "jsonl": _json_lines,
    "json": _json,
    "csv": _table,
    "tsv": _table,
    "parquet": _parquet,
}


def _opened(path: DataFile, reading: Reading) -> IO[str]:
    """The file as text, decompressed if its last suffix says that it is compressed."""
    if path.suffix == ".zst":
        return _zstandard(path)
    raw = reading.raw = path.open("rb")
    opener: Callable[..., IO[str]] | None = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }.get(path.suffix)  # type: ignore[assignment]
    try:
        if opener:
            return opener(raw, "rt", encoding=_ENCODING, newline="")
        return io.TextIOWrapper(raw, encoding=_ENCODING, newline="")
    except BaseException:
        raw.close()
        raise


def _zstandard(path: DataFile) -> IO[str]:
    try:
        import pyarrow as arrow
    except ImportError:
        raise DataError(f"data.path: {path}: .zst files need the package `pyarrow`") from None
    try:
        remote = isinstance(path, RemoteFile)
        raw = arrow.PythonFile(path.open("rb")) if remote else arrow.OSFile(str(path))
        stream = arrow.CompressedInputStream(raw, "zstd")
    except arrow.ArrowException as error:
        raise DataError(f"data.path: {path} cannot be read: {error}") from None
    return io.TextIOWrapper(io.BufferedReader(stream), encoding=_ENCODING, newline="")
