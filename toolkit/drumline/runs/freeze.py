"""Copies a project's code into a run folder, so that a job trains what was submitted, whatever is edited."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from drumline.errors import RunError
from drumline.files import apply_umask, parse_json
from drumline.runs.code import inside, is_in_a_run, listed_files
from drumline.secrets import Secrets, is_secret_file

FILE_LIMIT = 1 << 20
TOTAL_LIMIT = 256 << 20
MOST_FILES = 20_000
_NEVER = {"__pycache__", "node_modules", ".git"}


@dataclass
class Frozen:
    """The copy: number of files, their bytes, and each omitted file with the reason."""

    files: int = 0
    size: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def freeze_project(project: Path, target: Path) -> Frozen:
    """Copy the project's files into the new folder `target`.

    In a git repository: tracked files as they are now, and untracked ones that are not ignored; elsewhere all
    files. Python files of any size are copied, others up to FILE_LIMIT bytes. Left out: links, files whose
    name says that they hold secrets, caches, virtual environments and run folders. RunError if there is too
    much to be a project's code.
    """
    found = Frozen()
    target.mkdir(parents=True)
    for name in _names(project):
        source = project / name
        if why := _why_left_out(project, name):
            if why != "gone":
                found.left_out[name] = why
            continue
        found.files += 1
        found.size += source.stat().st_size
        if found.files > MOST_FILES or found.size > TOTAL_LIMIT:
            raise RunError(
                f"project {project}: over {MOST_FILES:,} files or {TOTAL_LIMIT:,} bytes, too much to "
                "copy for a job. Nearest: a folder for the recipe and its code alone"
            )
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place, follow_symlinks=False)
        apply_umask(place, 0o666)
    return found


CODE_TEXT = "code.json"
"""A copy of the code as one JSON object, for nodes that get it with their configuration."""


def frozen_text(code: Path) -> dict[str, str]:
    """The text of each file of a copy, by its name; RunError for one that is not UTF-8 text."""
    found = {}
    for path in sorted(path for path in code.rglob("*") if path.is_file()):
        name = str(path.relative_to(code))
        try:
            found[name] = path.read_bytes().decode()
        except UnicodeDecodeError:
            raise RunError(
                f"{name}: is not text, and a ConfigMap holds text. Nearest: put it into the image"
            ) from None
    return found


def thaw(text: str, target: Path) -> None:
    """Write the files of `frozen_text` into the new folder `target`; RunError for a name leading outside."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise RunError(f"{CODE_TEXT}: is not a copy of a project's code")
    target.mkdir()
    for name, content in found.items():
        place = inside(target, str(name))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(content), encoding="utf-8")


def _why_left_out(project: Path, name: str) -> str:
    source = project / name
    parts = Path(name).parts
    if any(project.joinpath(*parts[: count + 1]).is_symlink() for count in range(len(parts))):
        return "a symbolic link, or in a folder that is one"
    if not source.is_file():
        return "not a regular file" if source.exists() else "gone"
    if is_secret_file(name):
        return "holds secrets by its name"
    size = source.stat().st_size
    if size <= FILE_LIMIT and Secrets({}).are_in(source.read_bytes().decode(errors="replace")):
        return "holds a secret"
    if source.suffix != ".py" and size > FILE_LIMIT:
        return f"{size:,} bytes, over {FILE_LIMIT:,}"
    return ""


def _names(project: Path) -> list[str]:
    """The project's files by name, relative to it, sorted; those of run folders are left out."""
    listed = listed_files(project)
    names = _walk(project) if listed is None else listed
    return sorted(name for name in names if not is_in_a_run(project, name))


def _walk(project: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(project):
        base = Path(folder)
        folders[:] = [
            name
            for name in folders
            if name not in _NEVER
            and not name.startswith(".")
            and not (base / name / "pyvenv.cfg").exists()
        ]
        found += [
            str((base / name).relative_to(project)) for name in files if not name.startswith(".")
        ]
        if len(found) > 10 * MOST_FILES:
            break
    return found
