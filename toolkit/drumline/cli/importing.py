"""`drumline import FILE…`: a recipe from the files of another tool."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from drumline.errors import RecipeError
from drumline.session.importing.draft import Draft

Files = Annotated[
    list[Path], typer.Argument(metavar="FILE…", help="YAML, JSON, or a shell script.")
]
To = Annotated[Path | None, typer.Option("--to", metavar="RECIPE.yaml", help="Where to write it.")]


def import_command(
    files: Files,
    to: To = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="How many GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Which kind of GPU.")] = None,
) -> None:
    """A recipe from files of axolotl, LLaMA-Factory, TRL, torchtune, the Trainer, accelerate or DeepSpeed.

    Lists what was not carried over and where results will differ, and plans it. Nothing of the files is
    executed. Example: drumline import train.sh ds.json --to mine.yaml
    """
    from drumline.architectures.gpus import find_gpu
    from drumline.files import write_text
    from drumline.recipe.catalogue import put_schema_beside
    from drumline.session.importing.importer import import_files

    if gpu:
        find_gpu(gpu)
    found = import_files(files, gpus, gpu)
    target = to or Path(f"{found.name}.recipe.yaml")
    if target.exists():
        raise RecipeError(f"{target}: exists and would be overwritten. Nearest: --to another.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's file ends in .yaml")
    write_text(target, found.text)
    put_schema_beside(target)
    print(found.text)
    _tell(found.draft)
    print(
        f"\nwritten to {target}, of {', '.join(found.tools)}; {found.draft.taken} keys carried over"
    )
    if found.problem:
        raise RecipeError(f"{target} is no legal recipe yet:\n{found.problem}")
    _plan(target)


def _tell(draft: Draft) -> None:
    """What was not carried over, by reason."""
    for kind in dict.fromkeys(one.kind for one in draft.left):
        print(f"not carried over: {kind}")
        for one in draft.left:
            if one.kind == kind:
                value = (
                    "(hidden)" if "token" in one.key or "key" in one.key else str(one.value)[:60]
                )
                print(f"  {one.key}: {value}    {one.why}")


def _plan(target: Path) -> None:
    """The plan; where the data are not at hand, as if they had so many rows."""
    from drumline.session.show import plan_table
    from drumline.session.unprepared import as_if, plan_or_assume

    plan, why = plan_or_assume(str(target))
    if why:
        print(f"\n{as_if()}")
    print(f"\n{plan_table(plan)}")
    if why:
        print(f"\nnot known yet: {why}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command("import")(import_command)
