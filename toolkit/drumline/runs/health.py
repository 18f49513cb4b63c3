"""Diagnoses a run folder: its state and what to do next. Read-only."""

import contextlib
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drumline.checkpoint.manifest import verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.errors import CheckpointError
from drumline.metrics_file import is_torn, last_step_line
from drumline.runs.folder import RunFolder
from drumline.units import format_bytes

State = Literal["running", "finished", "stopped", "failed", "interrupted", "never started"]

_NEXT = {
    "NotFinite": "lower optimizer.lr or mend the data in another run; ",
    "CheckpointError": "mend what the message names, a full disk say; ",
    "OutOfMemory": "take one of the changes above; ",
    "hang": "look at the late rank's stacks in its log; ",
    "mistake": "mend what the message names; ",
}
"""What to do before a resume, by the kind of the last failure."""


@dataclass(frozen=True)
class Health:
    """State of a run on disk.

    `step` is that of the last step line in metrics.jsonl; `sound` names the checkpoints that verify; `bad`
    maps each damaged checkpoint to its error.
    """

    run: str
    state: State
    step: int
    attempts: list[dict[str, Any]]
    sound: list[str]
    bad: dict[str, str]
    leftovers: list[str]
    warnings: list[str]
    next: str
    message: str = field(default="")


def examine(path: Path) -> Health:
    """Examine the run folder; reads every checkpoint completely, since only that verifies it."""
    folder = RunFolder(path)
    record = folder.read_record() if folder.record_file.is_file() else {}
    attempts = record.get("attempts", [])
    sound, bad = _checkpoints(folder.checkpoints)
    state = state_of(folder, attempts)
    warnings = [f"{name}: {why}" for name, why in bad.items()]
    torn, step = _metrics(folder.metrics_file)
    if torn:
        warnings.append("metrics.jsonl: its last line is torn; a resume mends it")
    warnings += _little_room(folder, sound)
    last = attempts[-1] if attempts else {}
    return Health(
        run=str(path),
        state=state,
        step=step,
        attempts=attempts,
        sound=sound,
        bad=bad,
        leftovers=sorted(
            p.name
            for p in folder.checkpoints.glob("*")
            if p.name.startswith(".") or ".bad-" in p.name
        ),
        warnings=warnings,
        next=_next(path, state, last, sound, bool(bad), bool(record.get("jobs"))),
        message=last.get("message") or "",
    )


def state_of(folder: RunFolder, attempts: list[dict[str, Any]]) -> State:
    """Whether the run is running, else how its last attempt ended."""
    if folder.is_locked():
        return "running"
    if not attempts:
        return "never started"
    outcome = attempts[-1]["outcome"]
    return "interrupted" if outcome is None else outcome


def _checkpoints(folder: Path) -> tuple[list[str], dict[str, str]]:
    sound, bad = [], {}
    for path in find_checkpoints(folder):
        try:
            verify(path)
            sound.append(path.name)
        except CheckpointError as error:
            if path.exists():  # else retention has just deleted it
                bad[path.name] = str(error)
    return sound, bad


def _metrics(path: Path) -> tuple[bool, int]:
    """Whether the last line is torn, and the step of the last complete step line."""
    line = last_step_line(path)
    return is_torn(path), line["step"] if line else 0


def _little_room(folder: RunFolder, sound: list[str]) -> list[str]:
    """Warn if the free disk space is at most twice the size of the newest sound checkpoint."""
    if not sound:
        return []
    size = 0
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        size = sum(p.stat().st_size for p in (folder.checkpoints / sound[-1]).iterdir())
    free = shutil.disk_usage(folder.path).free
    if free > 2 * size:
        return []
    return [f"{format_bytes(free)} free on disk, a checkpoint takes {format_bytes(size)}"]


def _next(
    path: Path,
    state: State,
    last: dict[str, Any],
    sound: list[str],
    damaged: bool,
    has_jobs: bool,
) -> str:
    shown = shlex.quote(str(path))
    if state == "running":
        return "nothing: it runs; a signal to it saves and stops"
    if state == "never started" and has_jobs:
        return f"drumline status {shown}: whether its jobs wait"
    if state == "never started":
        return f"rm -r {shown}, and run the recipe again"
    if state == "finished":
        return f"drumline plan {shown}/recipe.yaml shows what ran"
    if damaged and not sound:
        return (
            f"no checkpoint is sound: put a sound copy back into {shown}/checkpoints, or run anew"
        )
    first = _NEXT.get(last.get("kind", ""), "")
    where = f"from {sound[-1]}" if sound else "from the beginning, since nothing sound is saved"
    return f"{first}drumline resume {shown} goes on {where}"
