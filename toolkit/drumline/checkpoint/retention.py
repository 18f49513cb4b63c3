"""Finds, sets aside and deletes checkpoints in a run's checkpoint folder."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from drumline.checkpoint.manifest import MANIFEST, step_of, verify
from drumline.checkpoint.state import TrainState, badness
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.files import free_name
from drumline.recipe.schema import Checkpoint


def find_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; a folder gets its `step-*` name only once it is complete.

    CheckpointUnreadable if the folder is there and cannot be listed: it may hold sound ones.
    """
    paths = [folder / name for name in _names_in(folder)]
    found = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointUnreadable(
            f"{folder}: cannot be listed: {error.strerror}. Nearest: make it readable for this user"
        ) from None


def newest_sound(folder: Path, report: Callable[[str], None]) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that verifies; each damaged one is reported. Changes nothing.

    CheckpointUnreadable where a newer one cannot be read, since it may be sound.
    """
    for path in reversed(find_checkpoints(folder)):
        try:
            return path, verify(path)
        except CheckpointUnreadable:
            raise
        except CheckpointError as error:
            report(f"{error}; falling back to the one before")
    return None


def find_set_aside(folder: Path) -> list[str]:
    """Names of the checkpoints that were set aside because they were damaged, sorted."""
    return sorted(
        name for name in _names_in(folder) if name.startswith("step-") and ".bad-" in name
    )


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `<name>.bad-<n>`, so that no attempt loads it; returns the new path.

    Only a training may call it, after `verify` has found damage.
    """
    aside = free_name(path, "bad")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    return aside


def remove_abandoned(folder: Path) -> None:
    """Delete half-saved and half-deleted folders of earlier attempts; call it before the first save."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def apply_retention(
    folder: Path,
    spec: Checkpoint,
    state: TrainState,
    waits: Callable[[int], bool] = lambda step: False,
) -> None:
    """Delete all but the last `keep_last`, the best `keep_best`, and multiples of `keep_every` steps.

    `waits`: whether the checkpoint of a step is kept until a command has read it.
    """
    everything = find_checkpoints(folder)
    keep = set(everything[-spec.keep_last :])
    scored = [(badness(state, score), path) for path in everything
              if (score := state.scores.get(str(step_of(path)))) is not None]  # fmt: skip
    keep |= {path for _, path in sorted(scored)[: spec.keep_best]}
    for path in everything:
        step = step_of(path)
        assert step is not None
        milestone = spec.keep_every and step % spec.keep_every == 0
        if path not in keep and not milestone and not waits(step):
            with contextlib.suppress(OSError):
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint; a rename comes first, so that an incomplete one is never found.

    A link in a checkpoint's place is left alone: what it leads to is not this run's.
    """
    if path.is_symlink():
        return
    doomed = path.with_name(f".{path.name}.deleted.tmp")
    path.rename(doomed)
    (doomed / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(doomed)
