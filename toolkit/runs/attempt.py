"""One attempt: starts the launcher, watches the ranks, passes signals on, and leaves none behind.

Signals go straight to the ranks (each writes its process), because a launcher that is told to
stop kills its ranks before they have saved.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from launchers.base import Command
from toolkit.checkpoint.manifest import rank_manifest_name
from toolkit.files import write_text
from toolkit.patience import Patience
from toolkit.plan.model import Plan
from toolkit.processes import Process
from toolkit.rank_files import RankFiles
from toolkit.runs.folder import RunFolder
from toolkit.runs.outcome import AGREED, Result, judge, steps_done
from toolkit.runs.signals import Signals
from toolkit.runs.stragglers import Stragglers
from toolkit.runs.watchdog import Watchdog

_POLL_S = 0.1
_SETTLE_S = 2.0
"""After one rank has failed, the others have this long to say that they have failed too."""
_AGREED_S = 10.0
"""And this long where all are about to say the same, and one may still be writing to a slow disk."""
_DRAIN_S = 60.0
"""And this long to publish a checkpoint whose parts are all on disk or being written."""
_LEAVE_S = 30.0
"""How long a launcher may take to leave after all its ranks have said how they ended."""

_REMOTE_LEAVE_S = 10.0
"""How long ranks on other hosts, and then what started them, may take to see that it is over."""

_DEATH_S = 10.0
"""A killed process is gone once the system has let it go."""

Tick = Callable[[RunFolder], None]
"""Called several times a second while an attempt runs; shows progress."""


def run_attempt(
    folder: RunFolder,
    plan: Plan,
    number: int,
    command: Command,
    tick: Tick,
    say: Callable[[str], None],
    signals: Signals,
) -> Result:
    """One start of the processes; returns when none of them is left."""
    logs = folder.logs(number)
    ranks = [RankFiles(logs, rank) for rank in range(plan.batch.gpus)]
    launch = plan.recipe.launch
    watchdog = Watchdog(ranks, Patience(launch.hang_timeout_s, launch.hang_factor))
    stragglers = Stragglers(ranks, launch.straggler_ratio)
    for path, text in command.files.items():
        write_text(Path(path), text)
    with (logs / "launcher.log").open("wb") as log:
        process = _start(command, log)
        try:

            def look() -> None:
                tick(folder)
                if words := stragglers.look():
                    say(words)

            hang = _watch(process, ranks, watchdog, signals, look, say)
            gone = _gone_without_a_word(ranks)
            if not hang and not signals.at_once:
                _let_settle(ranks, folder.checkpoints)
        finally:
            end_launcher(process, ranks, gently=command.is_remote)
    tick(folder)
    if hang:
        return Result.failure("hang", steps_done(ranks), hang)
    return judge(ranks, logs, signals.at_once, gone)


def _start(command: Command, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The launcher, in a session of its own; its ranks know whom to die with."""
    ours = {"PYTHONPATH": _python_path(), "DRUMLINE_SUPERVISOR": str(Process.current())}
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env, **ours},
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(
    process: subprocess.Popen[bytes],
    ranks: list[RankFiles],
    watchdog: Watchdog,
    signals: Signals,
    tick: Callable[[], None],
    say: Callable[[str], None],
) -> str:
    """Until the launcher has left or the attempt must be ended; words where a hang is why."""
    told: set[Process] = set()
    begun_told, all_said = False, None
    while process.poll() is None and not signals.at_once:
        if signals.first:
            told |= _tell(ranks, signals.first, told)
        tick()
        if not begun_told and (begun := ranks[0].begun()):
            begun_told = True
            say(_begun_words(begun))
        if _has_failed(ranks):
            return ""
        if late := watchdog.stuck():
            return watchdog.describe(late)
        if all(files.outcome() for files in ranks):
            all_said = all_said or time.monotonic()
            if time.monotonic() - all_said > _LEAVE_S:
                return ""
        time.sleep(_POLL_S)
    return ""


def end_launcher(process: subprocess.Popen[bytes], ranks: list[RankFiles], gently: bool) -> None:
    """The launcher and every rank are gone afterwards; one that reaches other hosts is asked first."""
    if gently:
        end_ranks(ranks)
        if not _leaves(process):
            process.terminate()
            _leaves(process)
    process.kill()
    process.wait()
    end_ranks(ranks)


def _leaves(process: subprocess.Popen[bytes]) -> bool:
    """Whether what started ranks on other hosts ends by itself."""
    try:
        process.wait(_REMOTE_LEAVE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_ranks(ranks: list[RankFiles]) -> None:
    """Kill what is left of an attempt, wait until it is gone, and turn away what comes up later."""
    ranks[0].end_attempt()
    for files in ranks:
        if process := files.process():
            process.send(signal.SIGKILL)
    deadline = time.monotonic() + _DEATH_S
    while any(_is_alive(files) for files in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)


def _begun_words(begun: dict[str, Any]) -> str:
    words = f"going on from {begun['checkpoint']}"
    if begun["set_aside"]:
        words += f"; damaged, and kept as {', '.join(begun['set_aside'])}: see rank 0's log"
    return words


def _has_failed(ranks: list[RankFiles]) -> bool:
    """Whether a rank has said so, or has gone without a word."""
    spoken = any((o := files.outcome()) and o["outcome"] == "failed" for files in ranks)
    return spoken or bool(_gone_without_a_word(ranks))


def _gone_without_a_word(ranks: list[RankFiles]) -> list[int]:
    """Ranks whose process has been here and is no more, and that have not said how they ended."""
    return [
        files.rank
        for files in ranks
        if (process := files.process())
        and process.is_here
        and not process.is_alive
        and files.outcome() is None
    ]


def _let_settle(ranks: list[RankFiles], checkpoints: Path) -> None:
    """Wait while ranks are still leaving by themselves, or a save can still come to its end."""
    started = time.monotonic()
    while any(_is_alive(files) for files in ranks):
        waited = time.monotonic() - started
        saving = waited < _DRAIN_S and _save_can_end(ranks, checkpoints, waited)
        if not saving and (waited > _AGREED_S or _cause_is_known(ranks, waited)):
            return
        time.sleep(_POLL_S)


def _cause_is_known(ranks: list[RankFiles], waited: float) -> bool:
    """Whether some rank is gone without a word, or has failed of itself and not of another."""
    outcomes = [outcome for files in ranks if (outcome := files.outcome())]
    kinds = {outcome.get("kind", "PeerLost") for outcome in outcomes} - {"PeerLost"}
    if kinds and kinds <= AGREED:  # all ranks are about to say the same
        return False
    return bool(kinds) or waited > _SETTLE_S or bool(_gone_without_a_word(ranks))


def _save_can_end(ranks: list[RankFiles], checkpoints: Path, waited: float) -> bool:
    """Whether a save is under way to which every rank that is gone has given its part.

    Once all parts are there it takes rank 0 no time to publish, unless a vote went with its rank.
    """
    gone = [files.rank for files in ranks if not _is_alive(files)]
    if 0 in gone:
        return False
    for path in checkpoints.glob(".step-*.tmp"):
        lacking = [f.rank for f in ranks if not (path / rank_manifest_name(f.rank)).exists()]
        if (lacking or waited < _SETTLE_S) and not set(lacking) & set(gone):
            return True
    return False


def _is_alive(files: RankFiles) -> bool:
    process = files.process()
    return process is not None and process.is_alive


def _tell(ranks: list[RankFiles], number: int, told: set[Process]) -> set[Process]:
    """Send a signal to the ranks that have not had it; those that start later get it later."""
    new = {process for files in ranks if (process := files.process()) and process not in told}
    for process in new:
        process.send(number)
    if any(not process.is_here for process in new):
        ranks[0].ask_to_stop()
    return new


def _python_path() -> str:
    """The workers import the same toolkit as this process, wherever they start."""
    here = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([here, before]) if before else here
