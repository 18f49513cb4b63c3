"""Reads rows from builtin sets, local files, the hub, or a factory of the recipe's project.

Every source is an iterator of plain dicts, streamed once and never held in memory as a whole.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.data import builtin
from drumline.data.factory import load_factory
from drumline.data.files import DataFile, class_of, is_media, matching_files, size_of
from drumline.data.media import MediaFiles, has_media, with_media
from drumline.data.readers import Reading, read_file
from drumline.data.source_row import SourceRow
from drumline.data.tasks.map_style import open_dataset
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def read(
    data: Data,
    project: str | None,
    reading: Reading | None = None,
    media: MediaFiles | None = None,
) -> Iterator[SourceRow]:
    """Iterate over the rows of the recipe's data source; `reading` is told how far its files are read.

    `media` notes the images and recordings that rows name.
    """
    media = media or MediaFiles()
    if data.source == "files":
        return _from_files(data, reading or Reading(0), media)
    if data.is_map_style:
        size = len(open_dataset(data, project))
        return (SourceRow({"index": n}, f"sample {n:,}") for n in range(size))
    found = _rows(data, project)
    return with_media(found, data, media) if has_media(data) else found


def _rows(data: Data, project: str | None) -> Iterator[SourceRow]:
    """Rows of a source that is no file."""
    if data.source == "builtin":
        assert data.name
        return builtin.documents(data.name, data.options)
    rows = _from_hub(data) if data.source == "hub" else _from_factory(data, project)
    return (SourceRow(fields, f"row {number:,}") for number, fields in enumerate(rows, 1))


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
    return "mixture" if data.mixture else "sha256"


def _from_files(data: Data, reading: Reading, media: MediaFiles) -> Iterator[SourceRow]:
    sizes = {path: size_of(path) for path in matching_files(data)}
    for path, size in sizes.items():
        if size == 0:
            raise DataError(f"data.path: {path} is empty (0 bytes)")
    reading.total = sum(size or 0 for size in sizes.values())
    for path, size in sizes.items():
        rows = _one_file(path, data) if is_media(path, data) else read_file(path, reading)
        if has_media(data):
            media.folder = path.parent if isinstance(path, Path) else None
            rows = with_media(rows, data, media)
        yield from rows
        reading.done, reading.raw = reading.done + (size or 0), None


def _one_file(path: DataFile, data: Data) -> Iterator[SourceRow]:
    """An image or a recording as a row, whose label is the name of its folder."""
    assert data.media_field and isinstance(path, Path)
    fields = {data.media_field: str(path.absolute()), data.label_field: class_of(path, data)}
    yield SourceRow(fields, str(path))


def _from_hub(data: Data) -> Iterator[dict[str, Any]]:
    load_dataset = _load_dataset()
    try:
        rows = load_dataset(
            data.name, data.config, split=data.split, streaming=True, **data.options
        )
        yield from _undecoded(rows, data)
    except (ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"data.name: {data.name} (split {data.split}) cannot be loaded: {error}. "
            "Nearest: download it where there is a network, or use source files"
        ) from error


def _undecoded(rows: Any, data: Data) -> Any:
    """The rows with images and recordings as the bytes of their files, not decoded."""
    name = data.media_field
    if name is None or name not in (rows.features or {}):
        return rows
    import datasets

    kind = (datasets.Image if data.image_field else datasets.Audio)(decode=False)
    is_list = isinstance(rows.features[name], datasets.List)
    return rows.cast_column(name, datasets.List(kind) if is_list else kind)


def _load_dataset() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError("this data source needs the package `datasets`") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our DataError reports its errors
    return datasets.load_dataset
