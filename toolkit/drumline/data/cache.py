"""Locates the folder of prepared rows, by a key computed from the recipe's data section.

The key is cheap: it uses names, sizes and times of data files, not their content. The fingerprint in the
dataset manifest identifies the content.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.data.factory import factory_files
from drumline.data.files import DataFile, matching_files
from drumline.errors import DataError
from drumline.recipe.data_section import ALONE, Data
from drumline.recipe.section import without_later_defaults

FORMAT_VERSION = 2


def cache_root() -> Path:
    """The folder $DRUMLINE_CACHE, or `drumline` in the user's cache folder."""
    stated = os.environ.get("DRUMLINE_CACHE")
    if stated:
        return Path(stated).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "drumline"


def cache_folder(data: Data, project: str | None) -> Path:
    """The folder for these data; it exists once they are prepared.

    The weights of a mixture, and how many samples an epoch of it has, change no row.
    """
    plain = without_later_defaults(data)
    if data.mixture is not None:
        del plain["samples"]
        for own in plain["mixture"]:
            del own["weight"]
    if (
        data.image is not None and not data.is_chat_with_images
    ):  # what is done to images while they are read changes no row
        plain["image"] = [data.image.size, data.image.channels, data.image.processor]
    if data.audio is not None:
        plain["audio"] = [data.audio.seconds]
    plain["format"] = FORMAT_VERSION
    plain["stamps"] = _stamps(data, project)
    text = json.dumps(plain, sort_keys=True)
    return cache_root() / "data" / hashlib.sha256(text.encode()).hexdigest()[:32]


def key_of_set(name: str) -> str:
    """The recipe's key of an evaluation set."""
    return "data.evaluation" if name == ALONE else f"data.evaluation.{name}"


def key_of_source(data: Data, label: str) -> str:
    """The recipe's key of a source of a mixture, or of the only source."""
    return f"data.mixture[{list(data.sources()).index(label)}]" if data.mixture else "data"


@contextlib.contextmanager
def told_of(key: str) -> Iterator[None]:
    """Context whose DataErrors tell this key."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}{str(error).removeprefix('data')}") from None


def _stamps(data: Data, project: str | None) -> Any:
    """Values that change with the sources: file sizes and times, hashes of factory code, Python's version."""
    stamps = []
    for label, own in data.sources().items():
        with told_of(key_of_source(data, label)):
            stamps += _stamps_of_source(own, project)
    for name, own in data.evaluation_sets().items():
        with told_of(key_of_set(name)):
            stamps += _stamps_of_source(own, project)
    if data.task_factory:
        stamps += _hashes(data.task_factory, project)
    if data.chat_template and data.chat_template.startswith("/"):
        if not Path(data.chat_template).is_file():
            raise DataError(f"data.chat_template: {data.chat_template} is no file")
        stamps += [_stamp(Path(data.chat_template))]
    media = data.image or data.audio
    if media and (media.processor or "").startswith("/"):
        from drumline.data.processors import processor_digests

        stamps += [processor_digests(data)]
    if data.tokenizer.startswith("/"):
        folder = Path(data.tokenizer)
        stamps += [_stamp(path) for path in sorted(folder.glob("*")) if path.is_file()]
    return stamps


def _stamps_of_source(data: Data, project: str | None) -> list[Any]:
    stamps: list[Any] = []
    if data.source == "builtin":
        stamps.append(platform.python_version())
    elif data.source == "files":
        stamps += [_stamp(path) for path in matching_files(data)]
    elif data.source in ("factory", "dataset"):
        assert data.factory
        stamps += _hashes(data.factory, project)
    return stamps


def _hashes(factory: str, project: str | None) -> list[str]:
    """SHA-256 of the factory's file and of those of the project that it imports."""
    return [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in factory_files([factory], project)
    ]


def _stamp(path: DataFile) -> list[Any]:
    if not isinstance(path, Path):
        return path.stamp
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
