"""Reads rows from builtin sets, local files, the hub, or a factory of the recipe's project.

Every source is an iterator of plain dicts, streamed once and never held in memory as a whole.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.data import builtin
from drumline.data.factory import load_factory
from drumline.data.files import FORMATS, matching_files
from drumline.errors import DataError
from drumline.recipe.schema import Data


def read(data: Data, project: str | None) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of the recipe's data source."""
    if data.source == "builtin":
        assert data.name
        return builtin.documents(data.name, data.options)
    if data.source == "files":
        return _from_files(data)
    if data.source == "hub":
        return _from_hub(data)
    return _from_factory(data, project)


def _from_factory(data: Data, project: str | None) -> Iterator[dict[str, Any]]:
    """Rows of the project's factory; its exceptions become DataErrors that name it."""
    assert data.factory
    function = load_factory(data.factory, project)
    try:
        for row in function(**data.options):
            if not isinstance(row, dict):
                raise TypeError(f"a row is a mapping, not {type(row).__name__}")
            yield row
    except Exception as error:
        raise DataError(f"data.factory: {data.factory}: {type(error).__name__}: {error}") from error


def source_label(data: Data) -> str:
    """Prefix of the fingerprint."""
    if data.source == "builtin":
        assert data.name
        return builtin.label(data.name)
    return "sha256"


def _from_files(data: Data) -> Iterator[dict[str, Any]]:
    files = matching_files(data)
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"data.path: {path} is empty (0 bytes)")
    for path in files:
        if FORMATS[path.suffix] == "text":
            yield from _text_file(path)
        else:
            yield from _table_file(path)


def _text_file(path: Path) -> Iterator[dict[str, Any]]:
    """Read a text file as one document, in blocks."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            block = file.read(builtin.BLOCK_CHARACTERS)
            while block:
                following = file.read(builtin.BLOCK_CHARACTERS)
                yield {"text": block, "ends": not following}
                block = following
    except UnicodeDecodeError as error:
        raise DataError(f"data.path: {path} is not UTF-8 text (near byte {error.start})") from None


def _table_file(path: Path) -> Iterator[dict[str, Any]]:
    """Stream rows of JSON, CSV and Parquet files through `datasets`."""
    load_dataset = _load_dataset()
    try:
        yield from load_dataset(
            FORMATS[path.suffix], data_files=glob.escape(str(path)), split="train", streaming=True
        )
    except Exception as error:  # datasets wraps reader errors in many types
        cause = str(error.__cause__ or error) or type(error).__name__
        raise DataError(
            f"data.path: {path} cannot be read as {path.suffix[1:]}: {cause}"
        ) from error


def _from_hub(data: Data) -> Iterator[dict[str, Any]]:
    load_dataset = _load_dataset()
    try:
        yield from load_dataset(data.name, split=data.split, streaming=True, **data.options)
    except (ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"data.name: {data.name} (split {data.split}) cannot be loaded: {error}. "
            "Nearest: download it where there is a network, or use source files"
        ) from error


def _load_dataset() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("this data source needs the package `datasets`") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our DataError reports its errors
    return datasets.load_dataset
