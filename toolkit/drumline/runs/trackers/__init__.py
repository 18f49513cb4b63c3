"""Runs W&B and TensorBoard beside a run, each in its own process that follows metrics.jsonl.

The ranks never wait for a tracker. The supervisor watches it, and kills it with one warning if it fails,
hangs, or does not exit.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from drumline.processes import Process, python_path
from drumline.recipe.schema import Recipe
from drumline.runs.folder import RunFolder

HANG_S = 300.0
"""A tracker that has not touched its heartbeat file for this many seconds is hung."""

LEAVE_S = 60.0
"""How many seconds a tracker may take to send the rest after the run has ended."""


def wanted(recipe: Recipe) -> list[str]:
    """Names of the trackers that the recipe asks for."""
    logging = recipe.logging
    return [
        name for name, on in (("wandb", logging.wandb), ("tensorboard", logging.tensorboard)) if on
    ]


def tracker_entries(recipe: Recipe, before: dict[str, Any] | None) -> dict[str, Any]:
    """Build the record's `trackers`; W&B's run id is created once, so a resume continues that W&B run."""
    found: dict[str, Any] = dict(before or {})
    if recipe.logging.wandb and "wandb" not in found:
        spec = recipe.logging.wandb
        found["wandb"] = {**spec.model_dump(), "id": secrets.token_hex(4)}
    return found


class Trackers:
    """Starts and watches a run's trackers while its supervisor runs."""

    def __init__(self, folder: RunFolder, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._say = say
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path, Path]] = {}
        names = wanted(recipe)
        if names:
            folder.note(trackers=tracker_entries(recipe, folder.read_record().get("trackers")))
        for name in names:
            self._start(folder, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def look(self) -> None:
        """Drop trackers that have ended or hang; takes a few microseconds."""
        for name, (process, heartbeat, log) in list(self._running.items()):
            if process.poll() is not None:
                self._drop(name, _last_line(log) or f"it ended with code {process.returncode}")
            elif time.time() - _mtime(heartbeat) > HANG_S:
                self._drop(name, f"it has not moved for {HANG_S:.0f} s")

    def finish(self) -> None:
        """Let the trackers send the rest; those that take longer than `LEAVE_S` are dropped."""
        for _, heartbeat, _ in self._running.values():
            over_file(heartbeat).touch()
        deadline = time.monotonic() + LEAVE_S
        for name, (process, _, log) in list(self._running.items()):
            try:
                code = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._drop(name, f"it did not send the rest within {LEAVE_S:.0f} s")
                continue
            if code:
                self._drop(name, _last_line(log) or f"it ended with code {code}")
        self._running.clear()

    def _start(self, folder: RunFolder, name: str) -> None:
        place = folder.path / "trackers"
        place.mkdir(exist_ok=True)
        heartbeat, log = place / f"{name}.heartbeat", place / f"{name}.log"
        heartbeat.touch()
        over_file(heartbeat).unlink(missing_ok=True)
        env = {
            **os.environ,
            "PYTHONPATH": python_path(os.environ),
            "DRUMLINE_SUPERVISOR": str(Process.current()),
        }
        command = [
            sys.executable,
            "-P",
            "-m",
            "drumline.runs.trackers.follow",
            name,
            str(folder.path),
        ]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._running[name] = (process, heartbeat, log)

    def _drop(self, name: str, why: str) -> None:
        process, _, log = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._say(f"{name} is dropped: {why} (metrics.jsonl has every step; see {log})")


def over_file(heartbeat: Path) -> Path:
    """Path of the file that tells a tracker that the run has ended."""
    return heartbeat.with_suffix(".over")


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
