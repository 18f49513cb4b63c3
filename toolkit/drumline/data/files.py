"""Finds the local files of a recipe and their formats. No numpy, so that planning can import it."""

import glob
from pathlib import Path

from drumline.errors import DataError
from drumline.recipe.schema import Data

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def matching_files(data: Data) -> list[Path]:
    """The files of `data.path`, each pattern's sorted; DataError for no match or an unknown format."""
    patterns = [data.path] if isinstance(data.path, str) else data.path or []
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            raise DataError(f"data.path: {pattern} is a folder. Nearest: {pattern}/*.txt")
        found_paths = (
            [path] if path.is_file() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        )
        matches = [match for match in found_paths if match.is_file()]
        if not matches:
            what = "matches no file" if any(c in pattern for c in "*?[") else "does not exist"
            raise DataError(f"data.path: {pattern} {what}")
        found += matches
    for path in found:
        if path.suffix not in FORMATS:
            raise DataError(
                f"data.path: {path}: {path.suffix or 'no suffix'} is not a known format "
                f"({', '.join(FORMATS)})"
            )
    return found
