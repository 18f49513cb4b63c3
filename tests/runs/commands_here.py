"""The real command line in a forked child of the test, which may give up being root first."""

import os
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import drumline.train.export  # imported here, because another user may not be able to read Python's library
from drumline.cli import COMMANDS

for _module in sorted(set(COMMANDS.values())):
    import_module(f"drumline.cli.{_module}")
assert drumline.train.export

NOBODY = 65534


@dataclass
class Done:
    """What a command left: its exit code (minus the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str


def call(
    folder: Path,
    *arguments: str,
    user: int | None = None,
    descriptors: int | None = None,
    limit_s: int = 60,
    closed: int | None = None,
    full: int | None = None,
) -> Done:
    """`drumline ARGUMENTS` in a folder, as `user` if given, with at most so many open `descriptors`.

    `closed`: of stdin, stdout and stderr the one that is closed; `full`: the one that is a full device.
    """
    out, err = (folder.parent / f"{folder.name}.{name}" for name in ("out", "err"))
    with out.open("wb") as to_out, err.open("wb") as to_err:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.dup2(to_out.fileno(), 1)
                os.dup2(to_err.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if full is not None:
                    os.dup2(os.open("/dev/full", os.O_WRONLY), full)
                if closed is not None:
                    os.close(closed)
                signal.alarm(limit_s)
                os.chdir(folder)
                code = _command(list(arguments), user, descriptors)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
    return Done(
        os.waitstatus_to_exitcode(status),
        out.read_text(errors="replace"),
        err.read_text(errors="replace"),
    )


def _command(arguments: list[str], user: int | None, descriptors: int | None) -> int:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # pytest's; main opens its own
    sys.argv = ["drumline", *arguments]
    from drumline.cli import main

    if user is not None:
        os.environ["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    try:
        main()
    except SystemExit as ending:
        return int(ending.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 70
    return 0


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and folder below, with size, modification time and what a link leads to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in (".lock", ".record.lock") and not path.is_symlink():
            continue  # taken by whoever looks whether the run is running; never read as data
        status = path.lstat()
        leads_to = os.readlink(path) if path.is_symlink() else ""
        size = status.st_size if path.is_file() else 0
        found[str(path.relative_to(folder))] = (size, status.st_mtime_ns, leads_to)
    return found
