"""`drumline new`: a recipe from a few answers."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.errors import DoesNotFit, RecipeError

_QUESTIONS = (
    ("model", "Model (a name of the hub, or a folder)", None),
    ("data", "Data (a file, a pattern, a folder, or a set of the hub)", None),
    ("method", "Train all weights (full), an adapter (lora), or one over 4 bits (qlora)", "full"),
    ("gpus", "GPUs in all", "8"),
    ("gpu", "Which kind, such as h100-80gb, a100-80gb, l4, cpu", "h100-80gb"),
)


def new_command(
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the hub, or a folder.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, pattern, folder, or set of the hub.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="full, lora or qlora.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs in all.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Which kind.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="causal_lm, sft, preference, classification, seq2seq; else as the rows look.",
        ),
    ] = None,
    effective: Annotated[
        int | None, typer.Option("--effective", min=1, help="Samples of an optimizer step.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=1, help="Tokens of a row.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the rows.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="RECIPE.yaml", help="Where to write it.")
    ] = None,
) -> None:
    """Write a recipe from a few answers, with the fastest split that fits, and plan it.

    Asks for what no option says. Example: drumline new --model gpt2 --data chats.jsonl --gpus 2 --gpu l4
    """
    given = {"model": model, "data": data, "method": method, "gpus": gpus, "gpu": gpu}
    answers = _answers(given)
    from drumline.files import write_text
    from drumline.recipe import catalogue
    from drumline.session.new_recipe import Wish, new_recipe
    from drumline.session.show import plan_table
    from drumline.session.unprepared import ROWS, as_if, plan_or_assume

    wish = Wish(**answers, task=task, effective=effective, sequence_length=sequence_length, epochs=epochs,
                name=to.stem if to else None)  # fmt: skip
    found = new_recipe(wish)
    target = to or Path(f"{found.name}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's file ends in .yaml")
    if target.exists():
        raise RecipeError(f"{target}: exists and would be overwritten. Nearest: --to another.yaml")
    write_text(target, found.text)
    catalogue.put_schema_beside(target)
    print(found.text)
    plan, why = plan_or_assume(str(target), found.samples or ROWS)
    if why:
        print(f"{as_if(found.samples or ROWS)}\n")
    print(plan_table(plan))
    if why:
        print(f"\nnot known yet: {why}", file=sys.stderr)
    print(f"\nwritten to {target}", file=sys.stderr)
    if found.is_split_chosen is False:
        raise DoesNotFit(
            "no split of this training is known to fit on these GPUs. The plan's advice says what would"
        )


def _answers(given: Mapping[str, str | int | None]) -> dict[str, Any]:
    """What the options say, and for the rest what is answered; without a terminal all must be given."""
    missing = [name for name, _, _ in _QUESTIONS if given[name] is None]
    if missing and not sys.stdin.isatty():
        flags = " ".join(f"--{name} …" for name in missing)
        raise RecipeError(
            f"drumline new asks on a terminal only; missing: {flags}. Nearest: these options"
        )
    answers: dict[str, Any] = dict(given)
    for name, question, default in _QUESTIONS:
        if answers[name] is None:
            answers[name] = typer.prompt(
                question, default=default, type=int if name == "gpus" else str
            )
    return answers


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command("new")(new_command)
