"""The command line: one file per command group, each reads the world and calls the pure core."""

import gc
import os
import signal
import sys
from importlib import import_module
from types import ModuleType

import typer

from drumline.errors import DrumlineError

COMMANDS = {
    "recipes": "recipes",
    "plan": "plan",
    "prepare": "plan",
    "schema": "plan",
    "run": "run",
    "resume": "run",
    "verify": "verify",
    "export": "export",
    "doctor": "doctor",
    "calibrate": "calibrate",
    "reproduce": "reproduce",
    "compare": "compare",
    "runs": "runs",
    "report": "report",
    "submit": "submit",
    "sweep": "sweep",
    "attend": "attend",
    "status": "jobs",
    "logs": "jobs",
    "cancel": "jobs",
}
"""Which file of this package holds a command; only that one is imported."""

KILLED_EXIT_CODE = 130

app = typer.Typer(
    name="drumline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Every rank in step: plan, train, resume. One recipe, one batch equation.

    `--debug` anywhere shows the traceback of an error.
    """


def _leave(number: int, frame: object) -> None:
    """A signal outside a supervised attempt: unwind, so that nothing half-written stays."""
    print(f"drumline: interrupted by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def _skip_pydantic_plugins() -> None:
    """Pydantic looks for plugins in every installed package; even told not to, it imports what it looks with.

    That takes a tenth of a dry run, so an empty loader stands in its place.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    loader = ModuleType("pydantic.plugin._loader")
    loader.get_plugins = tuple  # type: ignore[attr-defined]
    sys.modules.setdefault(loader.__name__, loader)


def main() -> None:
    """Entry point: a mistake of the user is one message on stderr and its class's exit code."""
    _skip_pydantic_plugins()
    gc.disable()  # nothing that starting up makes is garbage; it takes a tenth of a dry run
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    asked = COMMANDS.get(arguments[0]) if arguments else None
    for name in [asked] if asked else dict.fromkeys(COMMANDS.values()):
        import_module(f"drumline.cli.{name}").register(app)
    if asked != "plan":
        gc.enable()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)
    try:
        app(arguments)
    except DrumlineError as error:
        if "--debug" in sys.argv:
            raise
        print(f"drumline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ending:
        if ending.code == KILLED_EXIT_CODE:
            print("drumline: interrupted", file=sys.stderr)
        raise
    except OSError as error:
        if "--debug" in sys.argv or error.filename is None:
            raise
        print(f"drumline: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(DrumlineError.exit_code)
    finally:
        gc.freeze()  # nor is there anything worth collecting at the end
