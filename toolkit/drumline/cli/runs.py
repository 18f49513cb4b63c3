"""`drumline runs`: a table of the runs here."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from drumline.cli.options import AsJson
from drumline.errors import RunFolderError
from drumline.output import printable
from drumline.runs.catalogue import RunRow, list_runs
from drumline.runs.health import State
from drumline.units import format_duration

_HEAD = ("run", "state", "step", "loss", "batch", "split", "age", "reproduces")


def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Default: runs.")] = Path(
        "runs"
    ),
    state: Annotated[str | None, typer.Option("--state", help="Only these: finished, …")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Only of this recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with state, steps, loss, effective batch, split and age; newest first.

    Example: drumline runs
    """
    if state is not None and state not in get_args(State):
        raise RunFolderError(f"--state {state}: choose from {', '.join(get_args(State))}")
    rows = [
        row
        for row in list_runs(folder, _report)
        if state in (None, row.state) and recipe in (None, row.recipe)
    ]
    if as_json:
        print(json.dumps({"runs": [dataclasses.asdict(row) for row in rows]}))
        return
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    for row in cells:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _report(line: str) -> None:
    print(f"left out: {printable(line)}", file=sys.stderr)


def _cells(row: RunRow) -> tuple[str, ...]:
    total = f"/{row.total:,}" if row.total else ""
    parent = (
        f"{Path(row.reproduces).name} ({row.verdict or 'not compared'})" if row.reproduces else ""
    )
    return (
        Path(row.run).name,
        row.state,
        f"{row.step:,}{total}",
        "" if row.loss is None else f"{row.loss:.4f}",
        f"{row.effective:,}" if row.effective else "",
        " × ".join(map(str, row.split)),
        format_duration(row.age_s),
        parent,
    )


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("runs")(runs_command)
