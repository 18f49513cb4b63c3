"""Images and recordings of rows as the bytes of their files: from paths, tables, or what the hub gives."""

import base64
import binascii
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drumline.data.source_row import SourceRow
from drumline.data.tasks.base import field_of
from drumline.errors import DataError
from drumline.recipe.data_section import Data

Fields = dict[str, Any]


_IMAGE_PARTS = ("image", "image_url")
"""Types of the parts of a message that are images."""
_REFERENCES = ("image", "path", "image_url", "url")
"""Keys of such a part that say which image it is."""
_KNOWN_KEYS = ("type", "text", "index", "detail", *_REFERENCES)


def has_media(data: Data) -> bool:
    """Whether rows name files of images or recordings."""
    return data.media_field is not None or data.is_chat_with_images


class MediaFiles:
    """The files that rows name: where each was read, of how many bytes and when changed last."""

    NAME = "media.txt"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._lines: list[str] = []

    def of_another(self) -> "MediaFiles":
        """The same notes, for a source with a folder of its own."""
        found = MediaFiles()
        found._lines = self._lines
        return found

    def read(self, path: Path) -> bytes:
        """The bytes of a file, which is noted."""
        with path.open("rb") as file:
            self._lines.append(_stamped(path, os.fstat(file.fileno())))
            return file.read()

    def write(self, folder: Path) -> None:
        """Keep the notes beside the rows that were prepared of these files."""
        (folder / self.NAME).write_text("".join(dict.fromkeys(self._lines)), encoding="utf-8")

    @classmethod
    def have_changed(cls, folder: Path) -> bool:
        """Whether a file that was read then is another now; one that is gone is none."""
        try:
            text = (folder / cls.NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        for line in text.splitlines():
            path = Path(json.loads(line)[0])
            try:
                if _stamped(path, path.stat()) != f"{line}\n":
                    return True
            except OSError:
                continue
        return False


def _stamped(path: Path, status: os.stat_result) -> str:
    return json.dumps([str(path), status.st_size, status.st_mtime_ns]) + "\n"


def with_media(rows: Iterator[SourceRow], data: Data, files: MediaFiles) -> Iterator[SourceRow]:
    """The same rows with the bytes of the files in the column of `data.image_field` or `data.audio_field`.

    Of chats with images that is a list, empty where the row has none, and messages' own images are bytes,
    too. Relative paths are relative to the folder of `files`, which notes what is read. A row whose file
    cannot be read has a problem.
    """
    fill = _fill_chat if data.is_chat_with_images else _fill_column
    for row in rows:
        try:
            fields = fill(row.fields, data, files)
        except DataError as error:
            yield row if row.problem else replace(row, problem=str(error))
            continue
        yield replace(row, fields=fields, media_bytes=_size(fields))


def _fill_column(fields: Fields, data: Data, files: MediaFiles) -> Fields:
    """The fields of a row with one file."""
    name = data.media_field
    assert name
    is_there, value = field_of(fields, name)
    if not is_there:
        key, found = (
            "image_field" if data.image_field else "audio_field",
            ", ".join(map(str, fields)) or "no columns",
        )
        raise DataError(f"data.{key}: no column {name!r}; this row has: {found}")
    return {**fields, name: _bytes_of(value, files)}


def _fill_chat(fields: Fields, data: Data, files: MediaFiles) -> Fields:
    """The fields of a row whose chat has any number of images."""
    found = {name: _with_bytes(value, files) for name, value in fields.items()}
    name = data.image_field
    is_there, value = (False, None) if name is None else field_of(fields, name)
    if name is None or not is_there:
        return found
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return {**found, name: [_bytes_of(one, files) for one in listed]}


def _with_bytes(value: Any, files: MediaFiles) -> Any:
    """A column with the bytes of the images that its messages name, if it holds messages."""
    if isinstance(value, dict):
        return {name: _with_bytes(one, files) for name, one in value.items()}
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return value
    return [
        {**one, "content": [_part(part, files) for part in one["content"]]}
        if isinstance(one.get("content"), list)
        else one
        for one in value
    ]


def _part(part: Any, files: MediaFiles) -> Any:
    """A part of a message; one of an image has its bytes, or None where the row's column has them."""
    if not isinstance(part, dict) or part.get("type") not in _IMAGE_PARTS:
        return part
    odd = [k for k, v in part.items() if k not in _KNOWN_KEYS and v not in (None, "")]
    if odd:
        raise DataError(
            f"a part of type image with {odd[0]}: {part[odd[0]]!r:.40}, which is not followed. Nearest: "
            "image, the path of its file"
        )
    stated = next((part[key] for key in _REFERENCES if part.get(key) is not None), None)
    if isinstance(stated, dict) and "url" in stated:  # as OpenAI's API has it
        stated = stated["url"]
    if stated is not None:
        return {"type": "image", "image": _bytes_of(stated, files)}
    if part.get("index") is not None:
        return {"type": "image", "index": int(part["index"])}
    return {"type": "image", "image": None}


def _size(value: Any) -> int:
    """How many bytes of files are in a value."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _of_data_address(value: str) -> bytes:
    """The bytes of a data:...;base64,... address."""
    head, _, body = value.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{value[:40]}: no image that can be read: {error}") from None


def _bytes_of(value: Any, files: MediaFiles) -> bytes:
    """The bytes of an encoded file, by what stands in its column."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):  # as Parquet files of the hub have it
        raw = value.get("bytes")
        if isinstance(raw, bytes):
            return raw
        value = value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        return _of_data_address(value)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise DataError(
            f"{value[:80]}: addresses are not fetched. Nearest: download the files, and state their paths"
        )
    if isinstance(value, str) and value:
        value = value.removeprefix("file://")
        path = Path(value) if files.folder is None else files.folder / value
        try:
            return files.read(path.absolute())
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
