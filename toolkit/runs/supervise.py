"""Starts an attempt, watches it, passes signals on, and reads the truth from the outcome files.

Signals go straight to the ranks (each writes its process id), because a launcher that is told to
stop kills its ranks before they have saved. A second Ctrl-C ends everything at once.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.base import Command
from toolkit.errors import RunError
from toolkit.plan.model import Plan
from toolkit.runs.folder import RunFolder
from toolkit.runs.record import attempt_entry, now

STOPPED_EXIT_CODE = 75
KILLED_EXIT_CODE = 130
"""Ended at once by a second signal: no new checkpoint, nothing older lost, no restart."""

_POLL_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Tick = Callable[[RunFolder], None]
"""Called several times a second while an attempt runs; shows progress."""


@dataclass(frozen=True)
class Result:
    """How a run ended; `exit_code` is 0, 4 or 75, or the code of a mistake of the user."""

    outcome: str
    step: int
    loss: float | None
    evaluation: dict[str, float] | None
    message: str
    exit_code: int


def run_attempts(
    folder: RunFolder, plan: Plan, cause: str, render: Callable[[int], Command], tick: Tick
) -> Result:
    """Attempts until the run is finished, stopped, wrong, or makes no progress."""
    failures, failed_at = 0, -1
    while True:
        number = folder.add_attempt(plan, attempt_entry(plan, cause))
        result = _attempt(folder, plan, number, render(number), tick)
        folder.end_attempt(
            number, ended=now(), outcome=result.outcome, step=result.step, message=result.message
        )
        if result.outcome != "failed" or result.exit_code != RunError.exit_code:
            return result
        failures += 1
        if result.step == failed_at:
            return _with_message(result, f"no progress since step {failed_at}: {result.message}")
        if failures > plan.recipe.launch.max_restarts:
            return _with_message(
                result, f"gave up after {failures} failed starts: {result.message}"
            )
        failed_at, cause = result.step, f"restart: {result.message}"


def _attempt(folder: RunFolder, plan: Plan, number: int, command: Command, tick: Tick) -> Result:
    """One start of the processes; returns when none of them is left."""
    logs = folder.logs(number)
    with (logs / "launcher.log").open("wb") as log, _signals() as received:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env, "PYTHONPATH": _python_path()},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        told: set[int] = set()
        try:
            while process.poll() is None:
                if len(received) > 1:
                    process.kill()
                elif received:
                    told |= _tell(logs, received[0], told)
                tick(folder)
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
            _end_ranks(logs)
    tick(folder)
    return _judge(plan, logs, bool(received))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect signals instead of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda got, frame: received.append(got))
        for number in _SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(logs: Path, number: int, told: set[int]) -> set[int]:
    """Send a signal to the ranks that have not had it; those that start later get it later."""
    new = {pid for pid in _rank_pids(logs) if pid not in told}
    for pid in new:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return new


def _end_ranks(logs: Path) -> None:
    """Kill what a launcher left behind; a process id counts only if its command names this run."""
    for pid in _rank_pids(logs):
        with contextlib.suppress(OSError):
            if str(logs.parent.parent) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)


def _rank_pids(logs: Path) -> list[int]:
    pids = []
    for path in logs.glob("rank-*.pid"):
        with contextlib.suppress(OSError, ValueError):
            pids.append(int(path.read_text()))
    return pids


def _judge(plan: Plan, logs: Path, signalled: bool) -> Result:
    """What the outcome files say, whatever the launcher's exit code was."""
    outcomes = [_read(logs / f"rank-{rank}.outcome.json") for rank in range(plan.batch.gpus)]
    failed = [(rank, o) for rank, o in enumerate(outcomes) if o.get("outcome") == "failed"]
    missing = [rank for rank, outcome in enumerate(outcomes) if not outcome]
    step = _steps_done(logs)
    if failed:
        rank, first = min(failed, key=lambda pair: pair[1]["when"])
        message = f"rank {rank}: {first['error']}: {first['message']}"
        if first["exit_code"] != RunError.exit_code:
            message = first["message"]
        return Result("failed", step, None, None, message, first["exit_code"])
    if missing:
        ranks = ", ".join(map(str, missing))
        how = "killed after a signal" if signalled else "ended without an outcome"
        message = f"rank {ranks} {how}; see {logs}{_last_words(logs)}"
        return Result("failed", step, None, None, message, KILLED_EXIT_CODE if signalled else 4)
    first = outcomes[0]
    code = STOPPED_EXIT_CODE if first["outcome"] == "stopped" else 0
    return Result(
        first["outcome"], first["step"], first["loss"], first["evaluation"], first["reason"], code
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}


def _steps_done(logs: Path) -> int:
    """Steps that were finished: each rank's file holds the one that it had begun."""
    begun = [0]
    for path in logs.glob("rank-*.step"):
        with contextlib.suppress(OSError, ValueError):
            begun.append(int(path.read_text()))
    return max(0, max(begun) - 1)


def _last_words(logs: Path) -> str:
    """The end of the launcher's log, where an import error would stand."""
    text = (logs / "launcher.log").read_text(errors="replace").strip().splitlines()
    return "\n" + "\n".join(text[-5:]) if text else ""


def _with_message(result: Result, message: str) -> Result:
    return Result("failed", result.step, None, None, message, result.exit_code)


def _python_path() -> str:
    """The workers import the same toolkit as this process, wherever they start."""
    here = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([here, before]) if before else here
