"""Finds the files of a recipe and their formats. No numpy, so that planning can import it."""

import glob
import itertools
import re
from collections import Counter
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeAlias

from drumline.errors import DataError
from drumline.recipe.data_section import Data

if TYPE_CHECKING:
    from drumline.data.remote import RemoteFile

MOST_MATCHES = 200_000

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Suffixes of images, which are rows where the recipe has `data.image_field`."""
RECORDINGS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")
"""Suffixes of recordings, which are rows where the recipe has `data.audio_field`."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Last suffixes of compressed files, before which the format's stands. Parquet compresses by itself."""

_ESCAPED = re.compile(r"\[([*?[])\]")
"""What `glob.escape` makes of a character that is not meant as a pattern."""


DataFile: TypeAlias = "Path | RemoteFile"


def matching_files(data: Data) -> list[DataFile]:
    """The files of `data.path`, each pattern's sorted; DataError for no match or an unknown format."""
    patterns = [data.path] if isinstance(data.path, str) else data.path or []
    found: list[DataFile] = []
    for pattern in patterns:
        if "://" in pattern:
            from drumline.data.remote import find_remote

            found += find_remote(pattern, data.options)
            continue
        path = Path(pattern)
        literal = Path(_ESCAPED.sub(r"\1", pattern))
        if path.is_dir() or literal.is_dir():
            below = path if path.is_dir() else literal
            found += _files_below(below, data)
            continue
        found_paths = [literal] if literal.is_file() else map(Path, _matches(pattern))
        matches = [match for match in found_paths if match.is_file()]
        if not matches:
            is_pattern = any(c in _ESCAPED.sub("", pattern) for c in "*?[")
            what = "matches no file" if is_pattern else "does not exist"
            raise DataError(f"data.path: {literal} {what}")
        found += matches
    if len(set(found)) < len(found):
        twice, _ = Counter(found).most_common(1)[0]
        raise DataError(
            f"data.path: {twice} is matched twice. Nearest: patterns that do not overlap"
        )
    for file in found:
        if format_of(file) is None and not is_media(file, data):
            raise DataError(
                f"data.path: {file}: {file.suffix or 'no suffix'} is not a known format "
                f"({', '.join(FORMATS)}; all but .parquet also with {', '.join(COMPRESSIONS)})"
            )
    return found


def is_media(file: DataFile, data: Data) -> bool:
    """Whether a file is an image or a recording, by its suffix, and rows of these data are such."""
    if data.is_chat_with_images:
        return False
    suffixes = IMAGES if data.image_field else RECORDINGS if data.audio_field else ()
    return file.suffix.lower() in suffixes


def classes_of(data: Data) -> list[str] | None:
    """Names of the folders that images or recordings lie in, sorted; None where rows are not such files.

    DataError for one that lies in no folder of a class.
    """
    if data.source != "files" or data.media_field is None or data.task == "seq2seq":
        return None
    files = [file for file in matching_files(data) if is_media(file, data)]
    return sorted({class_of(file, data) for file in files}) or None


def class_of(file: DataFile, data: Data) -> str:
    """The first folder on the way from `data.path` to an image or a recording."""
    roots = [data.path] if isinstance(data.path, str) else data.path or []
    for root in roots:
        folder = Path(root)
        if folder.is_dir() and isinstance(file, Path) and file.is_relative_to(folder):
            parts = file.relative_to(folder).parts
            if len(parts) > 1:
                return parts[0]
            raise DataError(
                f"data.path: {file} lies in no folder of a class. Nearest: {folder / 'name-of-a-class'}"
            )
    assert isinstance(file, Path)
    return file.parent.name


def size_of(path: DataFile) -> int | None:
    """Bytes of a file; None where its server does not say."""
    return path.stat().st_size if isinstance(path, Path) else path.size


def format_of(path: DataFile) -> str | None:
    """The format of a file by its suffixes; None for an unknown one."""
    if path.suffix not in COMPRESSIONS:
        return FORMATS.get(path.suffix)
    found = FORMATS.get(PurePath(path.with_suffix("")).suffix)
    return None if found == "parquet" else found


def _files_below(folder: Path, data: Data) -> list[Path]:
    """All files of known formats in a folder and the folders in it, sorted; hidden ones are left out.

    Images and recordings are rows where there is no table that could name them.
    """
    seen = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    found = [path for path in seen if format_of(path)]
    if data.media_field:
        tables = [path for path in found if format_of(path) != "text"]
        found = tables or [path for path in seen if is_media(path, data)]
    if not found:
        raise DataError(
            f"data.path: {folder} holds no file of a known format ({', '.join(FORMATS)})"
        )
    return found


def _matches(pattern: str) -> list[str]:
    """What a pattern matches, sorted; DataError for more than any data set has."""
    found = list(itertools.islice(glob.iglob(pattern, recursive=True), MOST_MATCHES + 1))
    if len(found) > MOST_MATCHES:
        raise DataError(
            f"data.path: {pattern} matches more than {MOST_MATCHES:,} files and folders"
        )
    return sorted(found)
