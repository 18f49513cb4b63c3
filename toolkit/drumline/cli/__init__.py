"""The command line: one file per command group; each reads files and this machine, and calls the rest."""

import contextlib
import errno
import gc
import locale
import os
import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import Annotated

import typer

from drumline import __version__
from drumline.errors import DrumlineError, LaunchError
from drumline.output import ForgivingOutput, printable
from drumline.processes import heeded

COMMANDS = {
    "recipes": "recipes",
    "plan": "plan",
    "new": "new",
    "import": "importing",
    "prepare": "plan",
    "schema": "schema",
    "explain": "explain",
    "cache": "cache",
    "data": "data",
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
OUTPUT_FAILED_EXIT_CODE = 74
"""Standard output could not be written; as EX_IOERR of sysexits.h."""

app = typer.Typer(
    name="drumline",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"drumline {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
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


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode if the locale has another encoding.

    Paths and texts then mean the same to every process and in every record, whatever the locale of whoever
    reads them later. Output keeps the locale's encoding.
    """
    is_utf8 = sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8"
    if is_utf8 or not sys.executable or "DRUMLINE_UTF8" in os.environ:
        return
    told = os.environ.get("PYTHONIOENCODING") or locale.getpreferredencoding(False)
    environment = {**os.environ, "DRUMLINE_UTF8": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": told}
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)  # noqa: S606


def _open_streams() -> tuple[ForgivingOutput, ForgivingOutput]:
    """Replace stdout and stderr by outputs that never raise; closed ones become the null device.

    A closed descriptor would otherwise be given to the next file that is opened, and messages would go there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    encodings = [
        getattr(stream, "encoding", None) or "utf-8" for stream in (sys.stdout, sys.stderr)
    ]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    sys.stdout, sys.stderr = (
        ForgivingOutput(n, code) for n, code in zip((1, 2), encodings, strict=True)
    )
    return sys.stdout, sys.stderr


def main() -> None:
    """Run the command line and exit; see `_run` for errors.

    Where the output could not be written (a full disk), one message says so beside the command's own exit
    code, and the exit code is 74. A reader that left (`| head`) is no error.
    """
    _use_utf8()
    os.environ.pop("DRUMLINE_UTF8", None)
    out, err = _open_streams()
    code: object = 0
    try:
        _run()
    except SystemExit as ending:
        code = ending.code
        if code is not None and not isinstance(code, int):
            print(code, file=err)
            code = 1
    finally:
        out.flush()
        err.flush()
        gc.freeze()  # nothing is worth collecting at exit either
    failed = out.failed_with
    if failed and failed.errno != errno.EPIPE:
        told = f"the command itself ended with exit code {code or 0}"
        print(f"drumline: standard output: {failed.strerror}; {told}", file=err)
        code = OUTPUT_FAILED_EXIT_CODE
    sys.exit(code)  # type: ignore[arg-type]


def _run() -> None:
    """Run the command; a DrumlineError becomes one message on stderr and its class's exit code."""
    _skip_pydantic_plugins()
    gc.disable()  # collecting takes a tenth of a dry run, and start-up makes no garbage
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    asked = COMMANDS.get(arguments[0]) if arguments else None
    for name in [asked] if asked else dict.fromkeys(COMMANDS.values()):
        import_module(f"drumline.cli.{name}").register(app)
    if asked != "plan":
        gc.enable()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if heeded(number):
            signal.signal(number, _leave)
    try:
        _refuse_lost_folder()
        app(arguments)
    except DrumlineError as error:
        if "--debug" in sys.argv:
            raise
        print(f"drumline: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ending:
        if ending.code == KILLED_EXIT_CODE:
            print("drumline: interrupted", file=sys.stderr)
        raise
    except UnicodeEncodeError as error:
        if "--debug" in sys.argv:
            raise
        print(f"drumline: {printable(error.object)}: is not UTF-8 text", file=sys.stderr)
        sys.exit(DrumlineError.exit_code)
    except OSError as error:
        if "--debug" in sys.argv or error.errno is None:
            raise
        where = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
        print(f"drumline: {where}{error.strerror}", file=sys.stderr)
        sys.exit(DrumlineError.exit_code)


def _refuse_lost_folder() -> None:
    """Raise LaunchError if the current folder has been deleted, since paths are relative to it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise LaunchError("the current folder has been deleted. Nearest: cd to another") from None
