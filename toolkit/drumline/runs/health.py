"""Diagnoses a run folder: its state and what to do next. Read-only."""

import contextlib
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drumline.checkpoint.beginning import why_not_anew
from drumline.checkpoint.manifest import verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.metrics_file import count_bad_lines, is_torn, last_step_line, missing_steps
from drumline.runs.folder import RunFolder, refuse_links
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
    refuse_links(folder)
    record = folder.read_record() if folder.record_file.is_file() else {}
    attempts = record.get("attempts", [])
    found = _checkpoints(folder.checkpoints, record.get("weights"))
    sound, bad = found.sound, found.bad
    state = state_of(folder, attempts)
    warnings = [f"{name}: {why}" for name, why in [*bad.items(), *found.unreadable.items()]]
    torn, step = _metrics(folder.metrics_file)
    if torn:
        warnings.append("metrics.jsonl: its last line is torn; a resume mends it")
    if bad_lines := count_bad_lines(folder.metrics_file):
        warnings.append(f"metrics.jsonl: {bad_lines:,} lines are no metrics and are left out")
    before = folder.steps_before() if record else 0
    if gaps := missing_steps(folder.metrics_file, before):
        warnings.append(f"metrics.jsonl: {gaps:,} steps have no line")
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
        next=_next(folder, state, last, found, bool(record.get("jobs"))),
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


@dataclass(frozen=True)
class _Checkpoints:
    """Names of sound checkpoints; damaged and unreadable ones, each with the error."""

    sound: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def are_there(self) -> bool:
        """Whether there is any checkpoint, of whatever state."""
        return bool(self.sound or self.bad or self.unreadable)


def _checkpoints(folder: Path, weights: dict[str, Any] | None) -> _Checkpoints:
    """Verify every checkpoint; `weights` are the record's final ones, with which the last is compared."""
    from drumline.checkpoint.weights import refuse_other_weights

    found = _Checkpoints()
    try:
        paths = find_checkpoints(folder)
    except CheckpointUnreadable as error:
        found.unreadable[folder.name] = str(error)
        return found
    for path in paths:
        try:
            verify(path)
            refuse_other_weights(path, weights)
            found.sound.append(path.name)
        except CheckpointUnreadable as error:
            if path.exists():  # else retention has just deleted it
                found.unreadable[path.name] = str(error)
        except CheckpointError as error:
            if path.exists():
                found.bad[path.name] = str(error)
    return found


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
    folder: RunFolder,
    state: State,
    last: dict[str, Any],
    found: _Checkpoints,
    has_jobs: bool,
) -> str:
    path, sound = folder.path, found.sound
    shown = shlex.quote(str(path))
    if state == "running":
        return "nothing: it runs; a signal to it saves and stops"
    if state == "never started" and has_jobs:
        return f"drumline status {shown}: whether its jobs wait"
    if found.unreadable:
        return f"make {next(iter(found.unreadable))} readable for this user; nothing says that it is damaged"
    if state == "finished":
        return f"drumline plan {shown}/recipe.yaml shows what ran"
    why = why_not_anew(folder.checkpoints, folder.metrics_file)
    if state == "never started" and not (found.are_there or why):
        return f"run the recipe again in another folder; nothing was saved in {shown}"
    if state == "never started":
        return f"put record.json back into {shown}, which holds saved work"
    if not sound and (why or found.bad or folder.steps_reached()):
        put = f"put a sound copy back into {shown}/checkpoints, or " if why or found.bad else ""
        return f"{put}drumline resume --from-scratch {shown}, which begins again at step 1"
    if "data fingerprint" in (last.get("message") or ""):
        return "put the data back as they were when the run began; a resume is refused until then"
    first = _NEXT.get(last.get("kind", ""), "")
    where = (
        f"from {sound[-1]}" if sound else f"at step {folder.steps_before() + 1}: it made no step"
    )
    return f"{first}drumline resume {shown} goes on {where}"
