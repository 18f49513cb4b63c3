"""Whose code a recipe may run: that of projects that this user has run from a recipe file of their own.

A run folder can come from anybody, and its plan names a project and functions in it. The projects that this
user has trained from a recipe file are remembered in the user's own state folder, outside every run folder.
"""

import os
from pathlib import Path

from drumline.errors import RecipeError
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe, commands_of, factories_of

_LARGEST = 1 << 20
_OF_A_RUN = ("record.json", "metrics.jsonl", "checkpoints", "plan-0.json")
"""What a run folder holds, of which a stranger may have left some out."""


def load_to_run(where: str, overrides: list[str] | None, trust_code: bool) -> Recipe:
    """Load a recipe whose code will run: RecipeError if that is foreign code, see `refuse_foreign_code`.

    A recipe that lies in no run folder is this user's own word, and its project is remembered.
    """
    recipe = load_recipe(where, overrides)
    if is_from_a_run(where):
        refuse_foreign_code(recipe, where, trust_code)
    else:
        remember_project(recipe)
    return recipe


def is_from_a_run(where: str) -> bool:
    """Whether this argument of a command is a run folder, or the recipe.yaml in one."""
    path = Path(where)
    folders = [path] if path.is_dir() else [path.parent]
    return any(os.path.lexists(folder / name) for folder in folders for name in _OF_A_RUN)


def refuse_foreign_code(recipe: Recipe, where: str, trust_code: bool) -> None:
    """Raise RecipeError if the recipe of a run folder names code of a project that is not remembered."""
    named = [*factories_of(recipe), *commands_of(recipe)]
    if not named or trust_code:
        return
    if _resolved(recipe.project or ".") in _remembered():
        return
    place = recipe.project or "the current folder"
    raise RecipeError(
        f"{where}: it names code to run: {', '.join(named)} in {place}, and this user has not trained that "
        "project from a recipe of their own. Nearest: read it, then --trust-code"
    )


def remember_project(recipe: Recipe) -> None:
    """Remember the project of a recipe that this user has given by hand, or has said to trust."""
    if factories_of(recipe) or commands_of(recipe):
        _remember(_resolved(recipe.project or "."))


def _remember(project: str) -> None:
    if project in _remembered() or "\n" in project:
        return
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{project}\n")
    except OSError:  # a home that is read-only: later commands ask for --trust-code
        return


def _file() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "drumline/trusted-projects"


def _resolved(project: str) -> str:
    return str(Path(project).resolve())


def _remembered() -> set[str]:
    """The remembered projects; none if the file is missing, not this user's own, or writable by others."""
    try:
        with _file().open(encoding="utf-8", errors="surrogateescape") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022 or status.st_size > _LARGEST:
                return set()
            return set(file.read().splitlines())
    except OSError:
        return set()


def refuse_foreign_site(folder: Path, trust_code: bool) -> None:
    """Raise RecipeError if the site of a run folder would run commands, and this user did not submit the run.

    `folder`: the run folder; submitting remembers it.
    """
    if trust_code or _resolved(str(folder)) in _remembered():
        return
    raise RecipeError(
        f"{folder}: its site.yaml can name commands to run, and this user has not submitted this run. "
        "Nearest: --site with a file of your own, or read it, then --trust-code"
    )


def remember_folder(folder: Path) -> None:
    """Remember a run folder that this user has submitted, whose site file they wrote."""
    _remember(_resolved(str(folder)))
