"""Images and recordings of rows as the bytes of their files: from paths, tables, or what the hub gives."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drumline.data.source_row import SourceRow
from drumline.data.tasks.base import field_of
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def with_media(rows: Iterator[SourceRow], data: Data, folder: Path | None) -> Iterator[SourceRow]:
    """The same rows with the bytes of the file in the column of `data.image_field` or `data.audio_field`.

    `folder`: what relative paths in the rows are relative to. A row whose file cannot be read has a problem.
    """
    name = data.media_field
    assert name
    for row in rows:
        is_there, value = field_of(row.fields, name)
        try:
            if not is_there:
                found = ", ".join(map(str, row.fields)) or "no columns"
                raise DataError(f"data.{_key(data)}: no column {name!r}; this row has: {found}")
            raw = _bytes_of(value, folder)
        except DataError as error:
            yield row if row.problem else replace(row, problem=str(error))
            continue
        yield replace(row, fields={**row.fields, name: raw})


def _key(data: Data) -> str:
    return "image_field" if data.image_field else "audio_field"


def _bytes_of(value: Any, folder: Path | None) -> bytes:
    """The bytes of an encoded file, by what stands in its column."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):  # as Parquet files of the hub have it
        raw = value.get("bytes")
        if isinstance(raw, bytes):
            return raw
        value = value.get("path")
    if isinstance(value, str) and value:
        path = Path(value) if folder is None else folder / value
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        from PIL import Image as Pillow

        value = Pillow.fromarray(value)
    if hasattr(value, "save") and hasattr(value, "mode"):  # an image of Pillow
        file = io.BytesIO()
        value.save(file, format="PNG")
        return file.getvalue()
    raise DataError(f"{type(value).__name__} {value!r:.60} is no file of an image or a recording")
