"""`drumline report RUN…`: one HTML page about one or several runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from drumline.compare.report import write_report
from drumline.compare.sources import read_logged, understood
from drumline.files import write_text
from drumline.units import format_bytes


def report_command(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN…", help="Run folders, or anything that reproduce takes."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Default: report.html in the run, of several report.html here."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page: curves, memory, timeline, environment; several runs overlaid.

    Example: drumline report runs/tiny-code-lm-1 runs/tiny-code-lm-2
    """
    with understood(runs):
        logged = [read_logged(where) for where in runs]
        page = write_report(logged)
    if output is None:
        own = Path(logged[0].name)
        output = own / "report.html" if len(runs) == 1 and own.is_dir() else Path("report.html")
    write_text(output, page)
    print(output)
    print(f"{format_bytes(len(page.encode()))}, open it in any browser", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("report")(report_command)
