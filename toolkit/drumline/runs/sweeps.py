"""The folder of a sweep: sweep.json names its runs, which lie beside it."""

import re
from pathlib import Path

from drumline.errors import RunFolderError
from drumline.files import read_json

SWEEP = "sweep.json"


def is_sweep(path: Path) -> bool:
    """Whether this is the folder of a sweep, and not a run folder."""
    return (path / SWEEP).is_file() and not (path / "record.json").exists()


def runs_of_sweep(path: Path) -> list[Path]:
    """The run folders of a sweep that exist, in order; RunFolderError if sweep.json is not one."""
    try:
        names = read_json(path / SWEEP)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path / SWEEP}: cannot be read: {error}") from None
    if not isinstance(names, dict) or not all(re.fullmatch(r"[0-9]{1,8}", name) for name in names):
        raise RunFolderError(f"{path / SWEEP}: is not a sweep's list of runs")
    links = [name for name in names if (path / name).is_symlink()]
    if links:
        raise RunFolderError(
            f"{path / links[0]}: is a symbolic link, which may lead to another run"
        )
    return [path / name for name in names if (path / name / "record.json").is_file()]
