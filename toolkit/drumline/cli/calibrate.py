"""`drumline calibrate RUN…`: a correction table for plans, from what runs measured."""

import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer

from drumline.files import write_text
from drumline.memory.calibration import TOTALS, Calibration, errors, errors_left_out, fit
from drumline.recipe import yaml12
from drumline.runs.peaks import all_pairs

ENOUGH = 3
"""From this many attempts on, the corrected error of each is by a table fitted without it."""


def calibrate_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[
        Path, typer.Option("--output", help="Where the table goes; it is replaced.")
    ] = Path("calibration.yaml"),
) -> None:
    """Fit a correction table to measured memory peaks and step times; print the errors before and after it.

    `DRUMLINE_CALIBRATION=calibration.yaml drumline plan …` uses it.

    Example: drumline calibrate runs/tiny-code-lm-1
    """
    pairs = all_pairs(runs)
    table = fit(pairs)
    before = errors(pairs, Calibration())
    unseen = len(pairs) >= ENOUGH
    after = errors_left_out(pairs) if unseen else errors(pairs, table)
    words = (
        "by a table made without the run"
        if unseen
        else "on the same runs, so not an independent test"
    )
    print(f"{len(pairs)} attempts; predicted / measured - 1, median and worst; after: {words}")
    for name in TOTALS:
        print(f"  {name:<10} before {_shown(before[name])}   after {_shown(after[name])}")
    if times := [1 / pair.time - 1 for pair in pairs if pair.time]:
        print(f"  {'step time':<10} before {_shown(times)}   planned / measured - 1")
    write_text(output, yaml12.dump(table.to_plain()))
    print(f"table in {output}", file=sys.stderr)


def _shown(values: list[float]) -> str:
    worst = max(values, key=abs)
    return f"{100 * statistics.median(values):+6.2f} % {100 * worst:+6.2f} %"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("calibrate")(calibrate_command)
