"""Finds the shipped recipes by name, in a checkout or in an installed wheel."""

import shutil
from pathlib import Path

from drumline.errors import RecipeError

SCHEMA = "recipe.schema.json"
"""The JSON Schema for editors, which lies beside the recipes."""
SCHEMA_LINE = f"yaml-language-server: $schema={SCHEMA}"
"""The comment by which an editor finds it."""
_LONGEST_NAME = 255
_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Return the folder of the shipped YAML recipes and example model files."""
    installed = _PACKAGE / "shipped_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent.parent / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def put_schema_beside(recipe: Path) -> None:
    """Copy the JSON Schema into the recipe's folder, where its first line names it, unless there is one."""
    target = recipe.parent / SCHEMA
    if not target.exists():
        shutil.copyfile(folder() / SCHEMA, target)


def find(where: str) -> Path:
    """Return the file of a path or of a shipped recipe's name; RecipeError if there is none."""
    path = Path(where)
    if len(path.name) > _LONGEST_NAME:
        raise RecipeError(
            f"{where[:40]}…: {len(path.name)} characters are too many for a file name"
        )
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix not in (".yaml", ".yml") and "/" not in where:
        shipped = folder() / f"{where}.yaml"
        if shipped.is_file():
            return shipped
    if path.is_dir():
        raise RecipeError(f"{where}: a folder, not a recipe")
    raise RecipeError(f"{where}: no such file or shipped recipe{_suggestion(where)}")


def _suggestion(where: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(Path(where).stem, names(), n=1, cutoff=0.5)
    if close:
        return f". Did you mean the shipped recipe {close[0]!r}?"
    return "; `drumline recipes` lists the shipped ones"
