"""Finds, sets aside and deletes checkpoints in a run's checkpoint folder."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from drumline.checkpoint.manifest import MANIFEST, step_of, verify
from drumline.checkpoint.state import TrainState, badness
from drumline.errors import CheckpointError
from drumline.recipe.schema import Checkpoint


def find_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; a folder gets its `step-*` name only once it is complete."""
    found = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def newest_sound(folder: Path, report: Callable[[str], None]) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that verifies; each bad one is renamed `.bad-<n>` and reported."""
    for path in reversed(find_checkpoints(folder)):
        try:
            return path, verify(path)
        except CheckpointError as error:
            report(f"{error}; kept as {set_aside(path).name}, falling back to the one before")
    return None


def set_aside(path: Path) -> Path:
    """Rename a checkpoint to `<name>.bad-<n>`, so that no attempt loads it; returns the new path."""
    number = 1
    while (path.parent / f"{path.name}.bad-{number}").exists():
        number += 1
    aside = path.parent / f"{path.name}.bad-{number}"
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    return aside


def remove_abandoned(folder: Path) -> None:
    """Delete half-saved and half-deleted folders of earlier attempts; call it before the first save."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def apply_retention(folder: Path, spec: Checkpoint, state: TrainState) -> None:
    """Delete all but the last `keep_last`, the best `keep_best`, and multiples of `keep_every` steps."""
    everything = find_checkpoints(folder)
    keep = set(everything[-spec.keep_last :])
    scored = [(badness(state, score), path) for path in everything
              if (score := state.scores.get(str(step_of(path)))) is not None]  # fmt: skip
    keep |= {path for _, path in sorted(scored)[: spec.keep_best]}
    for path in everything:
        step = step_of(path)
        assert step is not None
        milestone = spec.keep_every and step % spec.keep_every == 0
        if path not in keep and not milestone:
            with contextlib.suppress(OSError):
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint; a rename comes first, so that an incomplete one is never found."""
    doomed = path.with_name(f".{path.name}.deleted.tmp")
    path.rename(doomed)
    (doomed / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(doomed)
