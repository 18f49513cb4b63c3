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

from drumline.checkpoint.manifest import rank_manifest_name
from drumline.files import write_text
from drumline.hang_timeout import HangTimeout
from drumline.plan.model import Plan
from drumline.processes import Process, python_path
from drumline.runs.folder import RunFolder
from drumline.supervise.outcome import AGREED, Result, judge
from drumline.supervise.ranks import Ranks
from drumline.supervise.signals import Signals
from drumline.supervise.stragglers import Stragglers
from drumline.supervise.watchdog import Watchdog
from drumline_launchers.base import Command

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
    ranks = Ranks(logs, plan.mesh.ranks)
    for path, text in command.files.items():
        write_text(Path(path), text)
    with (logs / "launcher.log").open("wb") as log:
        process = _start(command, log)
        try:
            hang = _Watch(process, ranks, plan, say, signals).until_over(lambda: tick(folder))
            ranks.refresh()
            died = ranks.died
            if not hang and not signals.at_once:
                _let_settle(ranks, folder.checkpoints)
        finally:
            end_launcher(process, ranks, gently=command.is_remote)
    tick(folder)
    if hang:
        ranks.refresh()
        return Result.failure("hang", ranks.steps_done, hang)
    return judge(ranks, logs, signals.at_once, died)


def _start(command: Command, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The launcher, in a session of its own; its ranks know whom to die with."""
    ours = {"PYTHONPATH": python_path(os.environ), "DRUMLINE_SUPERVISOR": str(Process.current())}
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env, **ours},
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class _Watch:
    """Watches an attempt: its launcher, its ranks, and the signals that come to this process."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ranks: Ranks,
        plan: Plan,
        say: Callable[[str], None],
        signals: Signals,
    ) -> None:
        self._process, self._ranks, self._say, self._signals = process, ranks, say, signals
        launch = plan.recipe.launch
        hang_timeout = HangTimeout(launch.hang_timeout_s, launch.hang_factor)
        self._watchdog = Watchdog(ranks, hang_timeout)
        self._stragglers = Stragglers(ranks, launch.straggler_ratio)
        self._signalled: set[Process] = set()
        self._has_begun = False
        self._all_ended_at: float | None = None

    def until_over(self, tick: Callable[[], None]) -> str:
        """Until the launcher has left or the attempt must be ended; words where a hang is why."""
        while self._process.poll() is None and not self._signals.at_once:
            if self._signals.first:
                self._pass_on(self._signals.first)
            tick()
            if self._ranks.is_due():
                self._ranks.refresh()
                self._tell_news()
                if self._ranks.have_failed:
                    return ""
                if late := self._watchdog.late_ranks():
                    return self._watchdog.describe(late)
                if self._launcher_should_have_left():
                    return ""
            time.sleep(_POLL_S)
        return ""

    def _pass_on(self, number: int) -> None:
        """Send the signal to the ranks that have not had it; those that start later get it later."""
        processes = {process for view in self._ranks if (process := view.process)}
        new = processes - self._signalled
        for process in new:
            process.send(number)
        if any(not process.is_here for process in new):
            self._ranks.files[0].ask_to_stop()
        self._signalled |= new

    def _tell_news(self) -> None:
        """What was loaded, and who is slow."""
        if not self._has_begun and (begun := self._ranks.files[0].begun()):
            self._has_begun = True
            self._say(_begun_words(begun))
        if words := self._stragglers.look():
            self._say(words)

    def _launcher_should_have_left(self) -> bool:
        """Whether all ranks have ended, and some time ago."""
        if not self._ranks.have_all_ended:
            return False
        self._all_ended_at = self._all_ended_at or time.monotonic()
        return time.monotonic() - self._all_ended_at > _LEAVE_S


def end_launcher(process: subprocess.Popen[bytes], ranks: Ranks, gently: bool) -> None:
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


def end_ranks(ranks: Ranks) -> None:
    """Kill what is left of an attempt, wait until it is gone, and turn away what comes up later."""
    ranks.files[0].end_attempt()
    for view in ranks:
        if process := view.process:
            process.send(signal.SIGKILL)
    deadline = time.monotonic() + _DEATH_S
    while ranks.alive and time.monotonic() < deadline:
        time.sleep(0.01)


def _begun_words(begun: dict[str, Any]) -> str:
    words = f"going on from {begun['checkpoint']}"
    if begun["set_aside"]:
        words += f"; damaged, and kept as {', '.join(begun['set_aside'])}: see rank 0's log"
    return words


def _let_settle(ranks: Ranks, checkpoints: Path) -> None:
    """Wait while ranks are still leaving by themselves, or a save can still come to its end."""
    started = time.monotonic()
    while ranks.alive:
        ranks.refresh()
        waited = time.monotonic() - started
        saving = waited < _DRAIN_S and _save_can_end(ranks, checkpoints, waited)
        if not saving and (waited > _AGREED_S or _cause_is_known(ranks, waited)):
            return
        time.sleep(_POLL_S)


def _cause_is_known(ranks: Ranks, waited: float) -> bool:
    """Whether some rank has died, or has failed of itself and not of another."""
    kinds = {view.outcome.get("kind", "PeerLost") for view in ranks if view.outcome} - {"PeerLost"}
    if kinds and kinds <= AGREED:  # all ranks are about to say the same
        return False
    return bool(kinds) or waited > _SETTLE_S or bool(ranks.died)


def _save_can_end(ranks: Ranks, checkpoints: Path, waited: float) -> bool:
    """Whether a save is under way to which every rank that is gone has given its part.

    Once all parts are there it takes rank 0 no time to publish, unless a part's report went with its rank.
    """
    alive = {view.rank for view in ranks.alive}
    if 0 not in alive:
        return False
    for path in checkpoints.glob(".step-*.tmp"):
        lacking = {v.rank for v in ranks if not (path / rank_manifest_name(v.rank)).exists()}
        if (lacking or waited < _SETTLE_S) and lacking <= alive:
            return True
    return False
