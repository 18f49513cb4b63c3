"""`drumline recipes ls | show NAME | copy NAME PATH`: the shipped recipes."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from drumline.errors import RecipeError
from drumline.plan.resolve import resolve
from drumline.recipe import catalogue
from drumline.recipe.load import load_recipe
from drumline.recipe.schema import Recipe, factories_of
from drumline.session.world import read_world
from drumline.units import format_bytes

group = typer.Typer(help="The shipped recipes.", rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name.")]


@group.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    """The shipped recipes; without a subcommand, `ls`."""
    if context.invoked_subcommand is None:
        list_recipes()


@group.command("ls")
def list_recipes() -> None:
    """Names, batch equations and predicted memory.

    Example: drumline recipes ls
    """
    for name in catalogue.names():
        recipe = load_recipe(name)
        plan = resolve(recipe, read_world(recipe))
        memory = plan.memory.device
        size = (
            f"{format_bytes(memory.high)} on {recipe.cluster.gpu_name}"
            if memory
            else "memory unknown"
        )
        print(f"{name:<22} {plan.batch.effective:>6,} = {plan.batch.split}  ({size})")


@group.command("show")
def show(name: Name) -> None:
    """Print the recipe's YAML.

    Example: drumline recipes show worked-example
    """
    print(_find(name).read_text(encoding="utf-8"), end="")


@group.command("copy")
def copy(
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new file or a folder.")],
) -> None:
    """Copy the recipe, and the files that it needs, for editing.

    Example: drumline recipes copy tiny-code-lm mine.yaml
    """
    source = _find(name)
    target = path / source.name if path.is_dir() else path
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's file ends in .yaml")
    recipe = load_recipe(name)
    files = {source: target}
    for needed in _needed(source, recipe):
        files[needed] = target.parent / needed.relative_to(source.parent)
    if len(set(files.values())) < len(files):
        raise RecipeError(f"{target}: the base of {name} needs that name; choose another path")
    for copied in files.values():
        if copied.exists():
            raise RecipeError(f"{copied}: exists and would be overwritten; choose another path")
    if not target.parent.is_dir():
        raise RecipeError(f"{target.parent}: no such folder")
    for origin, copied in files.items():
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(origin, copied)
        print(copied)
    catalogue.put_schema_beside(target)


def _find(name: str) -> Path:
    if name not in catalogue.names():
        catalogue.find(name)
        raise RecipeError(f"{name}: a file, not the name of a shipped recipe")
    return catalogue.folder() / f"{name}.yaml"


def _needed(source: Path, recipe: Recipe) -> list[Path]:
    """Return the recipe's base, if it extends one, and its factories, processor and tokenizer."""
    from drumline.recipe.yaml12 import parse

    base = parse(source.read_text(encoding="utf-8")).get("extends")
    needed = [source.parent / f"{base}.yaml"] if base else []
    needed += [source.parent / f"{name.partition(':')[0]}.py" for name in factories_of(recipe)]
    image = recipe.data.image
    for name in (recipe.data.tokenizer, image and image.processor):
        if name and Path(name).parent == source.parent:
            needed += sorted(Path(name).iterdir())
    return list(dict.fromkeys(needed))


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.add_typer(group, name="recipes")
