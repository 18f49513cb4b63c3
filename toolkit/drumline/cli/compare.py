"""`drumline compare A B`: what differs between two runs, and the first step at which it shows."""

import dataclasses
import json
from typing import Annotated

import typer

from drumline.cli.options import AsJson, Tolerance
from drumline.compare.comparison import TOLERANCE, Comparison, compare, step_indices
from drumline.compare.differences import difference_lines
from drumline.compare.logged import Logged
from drumline.compare.sources import read_logged, understood
from drumline.errors import NOT_EQUAL_EXIT_CODE
from drumline.output import printable

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, or anything that reproduce takes.")
]

_ROWS = 12
_MOST_INDICES = 12
_BARS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 48


def compare_command(
    a: RunArgument,
    b: RunArgument,
    tolerance: Tolerance = TOLERANCE,
    as_json: AsJson = False,
) -> None:
    """Show recipe and environment differences, the first differing step with its samples, the loss curves.

    Exit 0: identical, or equal within the tolerance; 5: diverged.

    Example: drumline compare runs/tiny-code-lm-1 runs/tiny-code-lm-2
    """
    with understood([a, b]):
        first, second = read_logged(a), read_logged(b)
        found = compare(first, second, tolerance)
        indices = _indices_at(found, first, second)
        page = "\n".join(_page(found, first, second, indices))
    if as_json:
        print(json.dumps({"a": a, "b": b, **dataclasses.asdict(found), "indices": indices}))
    else:
        print(printable(page))
    if found.verdict == "diverged":
        raise typer.Exit(NOT_EQUAL_EXIT_CODE)


def _indices_at(found: Comparison, a: Logged, b: Logged) -> dict[str, list[int] | None] | None:
    if found.first is None or found.first.step < 1:
        return None
    return {"a": step_indices(a, found.first.step), "b": step_indices(b, found.first.step)}


def _page(
    found: Comparison, a: Logged, b: Logged, indices: dict[str, list[int] | None] | None
) -> list[str]:
    lines = [f"a  {a.name}", f"b  {b.name}"]
    for title, group in (
        ("recipe", found.recipe),
        ("inputs", found.inputs),
        ("code", found.code),
        ("environment", found.environment),
    ):
        lines += ["", f"{title}: the same" if not group else f"{title}:"]
        lines += [f"  {line}" for line in difference_lines(group)]
    lines += ["", *_curves(a, b)]
    if indices and found.first:
        lines += ["", f"samples of step {found.first.step:,}:"]
        lines += [f"  {name}  {_index_words(theirs)}" for name, theirs in indices.items()]
    return [*lines, "", found.words]


def _curves(a: Logged, b: Logged) -> list[str]:
    """Format the losses of both runs: as bars, then as numbers at some steps."""
    theirs = {line["step"]: line for line in b.steps}
    both = [(line, theirs[line["step"]]) for line in a.steps if line["step"] in theirs]
    if not both:
        return ["no step in common"]
    values = [[pair[side]["loss"] for pair in both] for side in (0, 1)]
    known = [value for row in values for value in row if value is not None]
    lines = [f"loss {name} {_bars(row, known)}" for name, row in zip("ab", values, strict=True)]
    lines.append(
        f"{'step':>10}  {'loss a':>12}  {'loss b':>12}  {'b - a':>9}  {'lr a':>9}  {'lr b':>9}"
    )
    every = max(1, len(both) // _ROWS)
    for x, y in [*both[:-1:every], both[-1]]:
        apart = f"{y['loss'] - x['loss']:9.1e}" if None not in (x["loss"], y["loss"]) else "-"
        lines.append(
            f"{x['step']:>10,}  {_number(x['loss']):>12}  {_number(y['loss']):>12}  {apart:>9}  "
            f"{x['lr']:>9.2e}  {y['lr']:>9.2e}"
        )
    return lines


def _bars(row: list[float | None], known: list[float]) -> str:
    low, high = min(known, default=0.0), max(known, default=0.0)
    every = max(1, -(-len(row) // _BAR_COLUMNS))
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join("×" if v is None else _BARS[round((v - low) * scale)] for v in row[::every])


def _index_words(indices: list[int] | None) -> str:
    if indices is None:
        return "not recorded"
    shown = ", ".join(map(str, indices[:_MOST_INDICES]))
    more = len(indices) - _MOST_INDICES
    return f"{shown}, … {more:,} more" if more > 0 else shown


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.7f}"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("compare")(compare_command)
