"""One attempt: starts the launcher, watches the ranks, forwards signals, and ends every process.

Signals go directly to the ranks (each writes its process to a file), because a launcher that gets a stop
signal kills its ranks before they have saved.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from drumline.checkpoint.shards import rank_manifest_name
from drumline.files import write_text
from drumline.hang_timeout import HangTimeout
from drumline.plan.model import Plan
from drumline.processes import Process, python_path
from drumline.runs.folder import RunFolder
from drumline.secrets import Secrets
from drumline.supervise.outcome import AGREED, Result, judge
from drumline.supervise.ranks import Ranks
from drumline.supervise.signals import Signals
from drumline.supervise.stragglers import Stragglers
from drumline.supervise.watchdog import Watchdog
from drumline_launchers.base import Command
from drumline_launchers.environment import launch_environment

_POLL_S = 0.1
_SETTLE_S = 2.0
"""How long to wait for the cause when no rank has died and every failure so far is a PeerLost."""
_AGREED_S = 10.0
"""How long to wait when every rank raises the same error and one may still be writing its outcome."""
_DRAIN_S = 60.0
"""How long to wait for a checkpoint whose missing shards all belong to running ranks."""
_LEAVE_S = 30.0
"""How long a launcher may take to exit after all its ranks have written their outcomes."""

_REMOTE_LEAVE_S = 10.0
"""How long a remote launcher may take to exit once the attempt has ended, and again after SIGTERM."""

_DEATH_S = 10.0
"""How long to wait for killed ranks to disappear from the process table."""

Tick = Callable[[RunFolder], None]
"""Called several times a second while an attempt runs, to show progress."""


def run_attempt(
    folder: RunFolder,
    plan: Plan,
    number: int,
    command: Command,
    tick: Tick,
    say: Callable[[str], None],
    signals: Signals,
) -> Result:
    """Start the processes of one attempt and return how it ended once none of them is left."""
    logs = folder.logs(number)
    ranks = Ranks(logs, plan.mesh.ranks)
    command.write_files()
    with (logs / "launcher.log").open("wb") as log:
        process = _start(command, log)
        try:
            watch = _Watch(process, ranks, plan, say, signals, command.is_remote)
            hang = watch.until_over(lambda: tick(folder))
            ranks.refresh()
            died = ranks.died
            if not hang and not signals.at_once and not watch.was_stopped:
                _let_settle(ranks, folder.checkpoints)
        finally:
            end_launcher(process, ranks, gently=command.is_remote)
            _hide_secrets(logs / "launcher.log")
    tick(folder)
    if watch.was_stopped:
        return Result.stopped_early(
            f"stopped by {_signal_name(signals)} before the ranks had begun to train"
        )
    if hang:
        ranks.refresh()
        return Result.failure("hang", ranks.steps_done, hang)
    return judge(ranks, logs, signals.at_once, died)


def _signal_name(signals: Signals) -> str:
    """The name of the first signal that was received, such as SIGTERM."""
    return signal.Signals(signals.first).name if signals.first else "a signal"


def _start(command: Command, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the launcher in its own session; its ranks exit when the process in DRUMLINE_SUPERVISOR does."""
    ours = {"PYTHONPATH": python_path(os.environ), "DRUMLINE_SUPERVISOR": str(Process.current())}
    return subprocess.Popen(
        command.argv,
        env=launch_environment(os.environ, {**command.env, **ours}),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _hide_secrets(log: Path) -> None:
    """Take secrets out of the launcher's log, into which ranks print until they have a log of their own."""
    secrets = Secrets(os.environ)
    with contextlib.suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")
        if (hidden := secrets.hide(text)) != text:
            write_text(log, hidden)


class _Watch:
    """Watches an attempt: its launcher, its ranks, and the signals that this process receives."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ranks: Ranks,
        plan: Plan,
        say: Callable[[str], None],
        signals: Signals,
        is_remote: bool,
    ) -> None:
        self._process, self._ranks, self._say, self._signals = process, ranks, say, signals
        launch = plan.recipe.launch
        hang_timeout = HangTimeout(launch.hang_timeout_s, launch.hang_factor, is_remote)
        self._watchdog = Watchdog(ranks, hang_timeout)
        self._stragglers = Stragglers(ranks, launch.straggler_ratio)
        self._signalled: set[Process] = set()
        self._has_begun = False
        self._all_ended_at: float | None = None
        self.was_stopped = False

    def until_over(self, tick: Callable[[], None]) -> str:
        """Wait until the launcher exits or the attempt must end; returns a description of a hang, else ""."""
        while self._process.poll() is None and not self._signals.at_once:
            if self._signals.first:
                if self._nothing_is_at_stake():
                    self.was_stopped = True
                    return ""
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

    def _nothing_is_at_stake(self) -> bool:
        """Whether no rank has loaded a checkpoint yet, so that all can be ended without saving.

        Until then a rank may wait for others for minutes, and notice no signal. A heartbeat of another host
        may be old, so for ranks there only that none has started counts.
        """
        self._ranks.refresh()
        processes = [view.process for view in self._ranks]
        if not any(processes):
            return True
        if not all(process.is_here for process in processes if process):
            return False
        phases = {view.heartbeat.phase for view in self._ranks if view.heartbeat}
        return all(phase.is_before_loading for phase in phases) and not self._ranks.have_failed

    def _pass_on(self, number: int) -> None:
        """Send the signal to ranks that have not had it yet; ranks on other hosts are asked by a file."""
        processes = {process for view in self._ranks if (process := view.process)}
        new = processes - self._signalled
        for process in new:
            process.send(number)
        if any(not process.is_here for process in new):
            self._ranks.files[0].ask_to_stop()
        self._signalled |= new

    def _tell_news(self) -> None:
        """Report which checkpoint was loaded, and stragglers."""
        if not self._has_begun and (begun := self._ranks.files[0].begun()):
            self._has_begun = True
            self._say(_begun_words(begun))
        if words := self._stragglers.look():
            self._say(words)

    def _launcher_should_have_left(self) -> bool:
        """Whether all ranks ended more than `_LEAVE_S` seconds ago."""
        if not self._ranks.have_all_ended:
            return False
        self._all_ended_at = self._all_ended_at or time.monotonic()
        return time.monotonic() - self._all_ended_at > _LEAVE_S


def end_launcher(process: subprocess.Popen[bytes], ranks: Ranks, gently: bool) -> None:
    """Kill the launcher and every rank; with `gently` (ranks on other hosts) the launcher may exit first."""
    if gently:
        end_ranks(ranks)
        if not _leaves(process):
            process.terminate()
            _leaves(process)
    process.kill()
    process.wait()
    end_ranks(ranks)


def _leaves(process: subprocess.Popen[bytes]) -> bool:
    """Whether the remote launcher exits within `_REMOTE_LEAVE_S` seconds."""
    try:
        process.wait(_REMOTE_LEAVE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_ranks(ranks: Ranks) -> None:
    """Kill the ranks on this host and wait for their end; other and later ranks see `ended` and exit."""
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
    """Wait while ranks are still reporting why they failed, or while a save can still be published."""
    started = time.monotonic()
    while ranks.alive:
        ranks.refresh()
        waited = time.monotonic() - started
        saving = waited < _DRAIN_S and _save_can_end(ranks, checkpoints, waited)
        if not saving and (waited > _AGREED_S or _cause_is_known(ranks, waited)):
            return
        time.sleep(_POLL_S)


def _cause_is_known(ranks: Ranks, waited: float) -> bool:
    """Whether to stop waiting: a rank died or failed by its own error, or `_SETTLE_S` is over."""
    kinds = {view.outcome.get("kind", "PeerLost") for view in ranks if view.outcome} - {"PeerLost"}
    if kinds and kinds <= AGREED:  # every rank raises it, so wait for all of them
        return False
    return bool(kinds) or waited > _SETTLE_S or bool(ranks.died)


def _save_can_end(ranks: Ranks, checkpoints: Path, waited: float) -> bool:
    """Whether a save is under way in which every rank that is gone has written its shard.

    With all shards written, rank 0 publishes within `_SETTLE_S`, unless a rank died before it reported
    its shard: then rank 0 never publishes.
    """
    alive = {view.rank for view in ranks.alive}
    if 0 not in alive:
        return False
    for path in checkpoints.glob(".step-*.tmp"):
        lacking = {v.rank for v in ranks if not (path / rank_manifest_name(v.rank)).exists()}
        if (lacking or waited < _SETTLE_S) and lacking <= alive:
            return True
    return False
