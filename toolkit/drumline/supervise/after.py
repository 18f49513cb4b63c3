"""Runs the commands that checkpoints are owed (`evaluation.after`) beside the training, once per step."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drumline.after_files import AfterFiles, environment, metrics_of, numbers_in
from drumline.checkpoint.manifest import step_of, verify
from drumline.checkpoint.retention import apply_retention, find_checkpoints
from drumline.errors import CheckpointError
from drumline.metrics_file import Kind, MetricsFile, last_step_line
from drumline.plan.model import Plan
from drumline.plan.steps import is_due
from drumline.processes import Process
from drumline.recipe.evaluation_section import After
from drumline.runs.folder import RunFolder
from drumline.supervise.signals import Signals

_LOOK_S = 2.0
_GRACE_S = 10.0
"""Seconds that a command has to end after SIGTERM."""


@dataclass
class _Running:
    """A command that runs for a checkpoint."""

    spec: After
    step: int
    process: subprocess.Popen[bytes]
    started: float


class AfterWork:
    """The owed commands of one run, one at a time, the oldest step first.

    A command that was killed with the run is run again by the next supervisor; one that has ended, with
    whatever exit code, is not.
    """

    def __init__(self, folder: RunFolder, plan: Plan, say: Callable[[str], None]) -> None:
        self._specs = plan.recipe.after
        self._folder, self._plan, self._say = folder, plan, say
        self._files = AfterFiles(folder.path)
        self._running: _Running | None = None
        self._looked_at = 0.0
        self._end_orphans()

    def tick(self, last: int | None = None) -> bool:
        """Start and end commands; returns whether some are owed.

        `last`: the run's last step, once it is over.
        """
        if not self._specs:
            return False
        if self._running is None:
            now = time.monotonic()
            if last is None and now - self._looked_at < _LOOK_S:
                return True
            self._looked_at = now
            owed = self._owed(last)
            if owed is None:
                return False
            self._start(*owed)
        self._look()
        return True

    def finish(self, signals: Signals, last: int) -> bool:
        """Run what is still owed; returns whether all of it was, and no signal came."""
        if self.tick(last) and self._specs:
            self._say("training is done; commands that checkpoints are owed still run")
        while self.tick(last):
            if signals.first:
                self.stop()
                return False
            time.sleep(0.1)
        if self._specs:
            self._tell()
            self._apply_retention()
        return True

    def _apply_retention(self) -> None:
        """Delete the checkpoints that were kept for a command alone."""
        folder = self._folder.checkpoints
        with contextlib.suppress(CheckpointError, IndexError):
            state = verify(find_checkpoints(folder)[-1], range(0))
            apply_retention(folder, self._plan.recipe.checkpoint, state)

    def stop(self) -> None:
        """End the command that runs; it is owed again."""
        if self._running is None:
            return
        _end(self._running.process)
        self._files.file(self._running.step, self._running.spec.label, "pid").unlink(
            missing_ok=True
        )
        self._running = None

    def _owed(self, last: int | None) -> tuple[After, int, Path] | None:
        """The first command that has not been run, of the oldest checkpoint."""
        clock = self._plan.clock()
        for path in find_checkpoints(self._folder.checkpoints):
            step = step_of(path)
            assert step is not None
            for spec in self._specs:
                is_wanted = step == last or is_due(step, spec.every_steps, spec.every_epochs, clock)
                if is_wanted and not self._files.is_done(step, spec.label):
                    return spec, step, path
        return None

    def _start(self, spec: After, step: int, checkpoint: Path) -> None:
        checkpoint, run = checkpoint.absolute(), self._folder.path.absolute()
        numbers = self._files.file(step, spec.label, "numbers").absolute()
        numbers.unlink(missing_ok=True)
        filled = {
            "{checkpoint}": str(checkpoint),
            "{run}": str(run),
            "{step}": str(step),
            "{numbers}": str(numbers),
        }
        argv = [_filled(word, filled) for word in spec.run]
        with self._files.file(step, spec.label, "log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    argv,
                    cwd=self._plan.recipe.project or None,
                    env=environment(run, checkpoint, step, numbers),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._files.finish(step, spec.label, {"exit_code": 127, "message": str(error)})
                self._say(f"step {step}: {spec.label}: {error.strerror}: {argv[0]}")
                return
        self._running = _Running(spec, step, process, time.time())
        identity = str(Process.of(process.pid))
        self._files.file(step, spec.label, "pid").write_text(identity, encoding="utf-8")

    def _look(self) -> None:
        """Write the result of the command once it has ended, or has run longer than it may."""
        running = self._running
        if running is None:
            return
        spec, step = running.spec, running.step
        seconds = time.time() - running.started
        code = running.process.poll()
        is_late = spec.timeout_minutes is not None and seconds > 60 * spec.timeout_minutes
        if code is None and not is_late:
            return
        if code is None:
            _end(running.process)
            code = -signal.SIGTERM
        numbers = self._files.file(step, spec.label, "numbers")
        found = numbers_in(numbers, self._files.file(step, spec.label, "log"))
        result = {
            "exit_code": code,
            "numbers": found,
            "started": running.started,
            "seconds": seconds,
        }
        self._files.finish(step, spec.label, result)
        self._files.file(step, spec.label, "pid").unlink(missing_ok=True)
        self._running = None
        self._say(f"step {step}: {_words(spec.label, code, is_late, found)}")

    def _tell(self) -> None:
        """Add results to the metrics, when no rank writes them any more."""
        path = self._folder.metrics_file
        reached = (last_step_line(path) or {"step": 0})["step"]
        results = self._files.untold(reached)
        if not results:
            return
        file = MetricsFile(path, reached)
        for step, name, result in results:
            file.add(Kind.EVENT, step=step, **metrics_of(name, result))
        file.sync()
        file.close()
        for step, name, _ in results:
            self._files.told(step, name)

    def _end_orphans(self) -> None:
        """Kill a command that outlived its supervisor, so that it does not run twice at a time."""
        for path in (self._folder.path / "after").glob("step-*/*.pid"):
            process = Process.parse(path.read_text(encoding="utf-8"))
            if process and process.is_alive:
                os.killpg(process.pid, signal.SIGKILL)
            path.unlink(missing_ok=True)


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE_S)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _words(label: str, code: int, is_late: bool, numbers: dict[str, float]) -> str:
    if code:
        why = "took longer than timeout_minutes" if is_late else f"exit code {code}"
        return f"{label} failed ({why})"
    values = ", ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:6])
    return f"{label} {values or 'done'}"
