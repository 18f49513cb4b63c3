"""The command line: one file per command group; each reads files and this machine, and calls the rest."""

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
"""Maps each command to its module in this package; only that module is imported."""

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
    """Plan, train and resume distributed training from one recipe.

    `--debug` anywhere on the command line shows the traceback of an error.
    """


def _leave(number: int, frame: object) -> None:
    """Handle a signal outside a supervised attempt: raise SystemExit, so that cleanup code runs."""
    print(f"drumline: interrupted by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def _skip_pydantic_plugins() -> None:
    """Replace pydantic's plugin loader with an empty one, before pydantic is imported.

    Pydantic searches all installed packages for plugins. Even with plugins disabled it imports the modules
    for that search, which takes a tenth of a dry run.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    loader = ModuleType("pydantic.plugin._loader")
    loader.get_plugins = tuple  # type: ignore[attr-defined]
    sys.modules.setdefault(loader.__name__, loader)


def main() -> None:
    """Run the command line; a DrumlineError becomes one message on stderr and its class's exit code."""
    _skip_pydantic_plugins()
    gc.disable()  # collecting takes a tenth of a dry run, and start-up makes no garbage
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
        gc.freeze()  # nothing is worth collecting at exit either
