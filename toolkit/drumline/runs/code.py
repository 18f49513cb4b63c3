"""Records the code that a run used (commit, diff, untracked files) and restores it into a folder.

All of it is text inside the record, so the record alone is enough. Files with secrets, large files and
untracked binaries are left out and listed; ignored files and run folders are left out without being listed.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

from drumline.data.factory import factory_files
from drumline.errors import RunError
from drumline.recipe.schema import Recipe, factories_of
from drumline.runs.sweeps import SWEEP
from drumline.secrets import Secrets, is_secret_file

CODE = "code"
"""The folder in a run folder that holds the project's code: a job's copy, or what a record held."""
FILE_LIMIT = 256 << 10
TOTAL_LIMIT = 1 << 20
MOST_LEFT_OUT = 200
"""Maximum number of names in `left_out`; the rest is only counted."""
_GIT_S = 30.0
_SLOW = f"git did not answer within {_GIT_S:.0f} s"
_GIT_OFF = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "core.pager=cat", "core.sshCommand=false",
            "diff.external=", "submodule.recurse=false", "protocol.allow=never")  # fmt: skip
"""Settings under which git starts no other program."""
_NAMES_A_PROGRAM = re.compile(
    r"(?s)filter\..*\.(clean|smudge|process|required)|remote\..*\.promisor"
)
"""Settings of any name under which git starts a program, or fetches what a clone lacks by one."""
_ALLOWS_A_PROTOCOL = re.compile(r"(?s)protocol\..*\.allow")
_PLAIN_DIFF = ("-c", "core.quotepath=off", "diff", "--binary", "--no-renames", "--no-ext-diff",
               "--no-textconv", "--no-color", "--submodule=short",
               "--ignore-submodules=dirty")  # fmt: skip


def read_code(recipe: Recipe, folder: Path, secrets: Secrets) -> dict[str, Any]:
    """Read the repository of the recipe's project (or of `folder`) as it is now, and the factory files.

    `commit` is null outside a repository; `left_out` maps each omitted file to the reason.
    """
    base = Path(recipe.project) if recipe.project and factories_of(recipe) else folder
    found: dict[str, Any] = {"commit": None, "remote": None, "project": ".", "diff": "",
                             "untracked": {}, "left_out": {}}  # fmt: skip
    root = _said(base, "rev-parse", "--show-toplevel")
    if root and _is_its_own(Path(root)):
        top = Path(root)
        found["commit"] = _said(top, "rev-parse", "--verify", "-q", "HEAD") or None
        found["remote"] = secrets.hide(_said(top, "remote", "get-url", "origin")) or None
        found["project"] = os.path.relpath(base.resolve(), top.resolve())
        _add_diff(found, top, secrets)
        _add_untracked(found, top, secrets)
    found["factories"] = factory_hashes(recipe)
    if not found["commit"]:
        for name in found["factories"]:
            place = str(PurePosixPath(found["project"]) / name)
            if place not in found["untracked"]:
                _add_file(found, base / name, place, secrets)
    found["left_out"] = _counted(found["left_out"])
    return found


def restore_code(code: dict[str, Any], near: Path, target: Path) -> Path:
    """Recreate the recorded code in the new folder `target`; returns the project's folder in it.

    If a commit was recorded, `target` is a worktree of the repository that contains `near`; RunError if
    that repository lacks the commit or the diff does not apply.
    """
    commit = code["commit"]
    if commit:
        top = _said(near, "rev-parse", "--show-toplevel")
        if not top or not _said(Path(top), "rev-parse", "-q", "--verify", f"{commit}^{{commit}}"):
            where = f" of {code['remote']}" if code["remote"] else ""
            raise RunError(
                f"--code: commit {commit[:12]}{where} is not in {top or 'any repository here'}. Nearest: git "
                "fetch it, or run this inside a clone of that repository"
            )
        _git_or_fail(Path(top), "worktree", "add", "--quiet", "--detach", str(target), commit)
        if code["diff"]:
            _git_or_fail(target, "apply", "--binary", "--whitespace=nowarn", "-", text=code["diff"])
    else:
        target.mkdir(parents=True)
    for name, text in code["untracked"].items():
        place = inside(target, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return inside(target, code["project"])


def remove_worktree(worktree: Path) -> None:
    """Delete a worktree that `restore_code` made; an error of git is ignored."""
    _git(worktree, "worktree", "remove", "--force", str(worktree))


def inside(folder: Path, name: str) -> Path:
    """Resolve a recorded name in the folder; RunError if it leads outside, into .git or through a link."""
    place = Path(os.path.normpath(folder / name))
    if os.path.isabs(name) or not place.is_relative_to(folder) or ".git" in Path(name).parts:
        raise RunError(f"the record's file {name!r} would lie outside {folder}")
    for parent in [place, *place.parents]:
        if parent == folder:
            break
        if parent.is_symlink():
            raise RunError(f"the record's file {name!r} would follow the link {parent}")
    return place


def package_sha256() -> str:
    """SHA-256 over drumline's own source files, which reveals edits."""
    digest = hashlib.sha256()
    for package in ("drumline", "drumline_launchers"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def factory_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the project's files that the recipe's factories run, by name, relative to the project."""
    base = Path(recipe.project or ".")
    named = [
        name for name in factories_of(recipe) if (base / f"{name.partition(':')[0]}.py").is_file()
    ]
    files = factory_files(named, recipe.project)
    names = {os.path.relpath(path, base): path for path in files}
    return {name: hashlib.sha256(names[name].read_bytes()).hexdigest() for name in sorted(names)}


def listed_files(project: Path) -> list[str] | None:
    """Tracked files, and untracked ones that are not ignored, relative to the project; None outside git."""
    if not _said(project, "rev-parse", "--show-toplevel"):
        return None
    listed = _git(project, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    return None if listed is None else sorted(set(filter(None, listed.split("\0"))))


def is_in_a_run(top: Path, name: str) -> bool:
    """Whether a file, by its name relative to `top`, lies in a run folder or a sweep's: it is no code."""
    folders = [top / parent for parent in Path(name).parents if parent.name]
    return any((folder / file).exists() for folder in folders for file in ("record.json", SWEEP))


def _add_diff(found: dict[str, Any], top: Path, secrets: Secrets) -> None:
    if not found["commit"]:
        return
    text = _git(top, *_PLAIN_DIFF, "HEAD")
    if text is None:
        found["left_out"]["the diff"] = _SLOW
        return
    kept, size = [], 0
    for part in re.split(r"^(?=diff --git )", text, flags=re.MULTILINE):
        if not part:
            continue
        name = part.partition("\n")[0].rpartition(" b/")[2]
        why = _why_left_out(name, part, size, secrets)
        if why:
            found["left_out"][name] = why
        else:
            kept.append(part)
            size += len(part)
    found["diff"] = "".join(kept)


def _add_untracked(found: dict[str, Any], top: Path, secrets: Secrets) -> None:
    listed = _git(top, "ls-files", "--others", "--exclude-standard", "-z")
    if listed is None:
        found["left_out"]["untracked files"] = _SLOW
        return
    for name in sorted(filter(None, listed.split("\0"))):
        if not is_in_a_run(top, name) and not name.endswith(".part"):
            _add_file(found, top / name, name, secrets)


def _add_file(found: dict[str, Any], path: Path, name: str, secrets: Secrets) -> None:
    if path.is_symlink() or not path.is_file():
        found["left_out"][name] = "not a regular file"
        return
    used = sum(map(len, found["untracked"].values()))
    size = path.stat().st_size
    if size > FILE_LIMIT or used + size > TOTAL_LIMIT:
        most = f"{FILE_LIMIT:,}" if size > FILE_LIMIT else f"{TOTAL_LIMIT:,} in all"
        found["left_out"][name] = f"{size:,} bytes, over {most}"
        return
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        found["left_out"][name] = "not text"
        return
    why = _why_left_out(name, text, used, secrets)
    if why:
        found["left_out"][name] = why
    else:
        found["untracked"][name] = text


def _why_left_out(name: str, text: str, used: int, secrets: Secrets) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    if is_secret_file(name):
        return "holds a secret"
    if len(text) > FILE_LIMIT:  # first, because a search of many megabytes takes minutes
        return f"{len(text):,} characters, over {FILE_LIMIT:,}"
    if used + len(text) > TOTAL_LIMIT:
        return f"over {TOTAL_LIMIT:,} in all"
    return "holds a secret" if secrets.are_in(text) else ""


def _counted(left_out: dict[str, str]) -> dict[str, str]:
    """The first names, and the number of the others."""
    more = len(left_out) - MOST_LEFT_OUT
    if more <= 0:
        return left_out
    return {**dict(list(left_out.items())[:MOST_LEFT_OUT]), "…": f"{more:,} more files"}


def _is_its_own(top: Path) -> bool:
    """Whether a work tree's repository is its own: inside it, or one that names it as its work tree."""
    git = top / ".git"
    if git.is_symlink():
        return False
    if git.is_dir():
        return True
    listed = _git(top, "worktree", "list", "--porcelain", "-z") or ""
    return f"worktree {top.resolve()}" in listed.split("\0")


def _said(folder: Path, *arguments: str) -> str:
    """Git's stripped output; "" if it fails or times out."""
    return (_git(folder, *arguments) or "").strip()


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's output; "" if it fails (no git, no repository), None if it times out."""
    try:
        done = subprocess.run(
            [*_git_command(folder), *arguments],
            capture_output=True,
            timeout=_GIT_S,
            check=False,
            env=_git_environment(),
        )
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""


def _git_command(folder: Path) -> list[str]:
    """The start of a git command that runs no program which the repository's own configuration names.

    Filters have names of the repository's choice, so its configuration is listed first; listing runs nothing.
    """
    start = ["git", "-C", str(folder)]
    try:
        listed = subprocess.run(
            [*start, "config", "--list", "--name-only", "-z"],
            capture_output=True,
            timeout=_GIT_S,
            check=False,
            env=_git_environment(),
        ).stdout.decode(errors="surrogateescape")
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    names = [name for name in dict.fromkeys(listed.split("\0")) if name]
    own = [f"{name}={'false' if name.endswith(('.required', '.promisor')) else ''}" for name in names
           if _NAMES_A_PROGRAM.fullmatch(name)]  # fmt: skip
    odd = next((setting for setting in own if "\n" in setting or setting.count("=") > 1), None)
    if odd:
        raise RunError(
            f"{folder}: git's configuration has an odd name: {odd!r}. Nearest: remove it"
        )
    own += [f"{name}=never" for name in names if _ALLOWS_A_PROTOCOL.fullmatch(name)]
    return [*start, *(part for setting in (*_GIT_OFF, *own) for part in ("-c", setting))]


def _git_environment() -> dict[str, str]:
    """The environment without git's own variables, which could name programs or another repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {
        **kept,
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }


def _git_or_fail(folder: Path, *arguments: str, text: str = "") -> None:
    done = subprocess.run(
        [*_git_command(folder), *arguments],
        input=text.encode(),
        capture_output=True,
        check=False,
        env=_git_environment(),
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise RunError(f"--code: git {arguments[0]} in {folder}: {words}")
