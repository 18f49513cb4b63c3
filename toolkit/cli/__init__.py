"""The command line: one file per command group, each reads the world and calls the pure core."""

import sys

import typer

from toolkit.errors import DrumlineError

app = typer.Typer(
    name="drumline",
    help="Every rank in step: plan, train, resume. One recipe, one batch equation. "
    "`--debug` anywhere shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: a mistake of the user is one message on stderr and its class's exit code."""
    from toolkit.cli import doctor, plan, recipes, run

    for module in (recipes, plan, run, doctor):
        module.register(app)
    debug = "--debug" in sys.argv
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])
    except DrumlineError as error:
        if debug:
            raise
        print(f"drumline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
