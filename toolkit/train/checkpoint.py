"""Checkpoints that cannot be torn: written beside, fsynced, voted, renamed; verified before use.

    checkpoints/step-00000200/
        rank-0.safetensors   the tensors (or rows of tensors) that rank 0 owns
        rank-0.json          its manifest: tensor, global shape, first row, dtype, size, SHA-256
        state.json           step, samples, tokens, early stopping …; written by rank 0
        manifest.json        list of the ranks' manifests; written last, deleted first

Nothing is pickled and nothing is executed on load. One layout for every engine: a tensor is
described by rows of its first dimension, so any number of ranks can read what any number wrote.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.recipe.schema import Checkpoint
from toolkit.train.engines.torch import Piece

FORMAT_VERSION = 1
VOTE_TIMEOUT_S = 600.0
_NAME = re.compile(r"^step-(\d{8,})$")

Pieces = dict[str, Piece]


@dataclass
class TrainState:
    """What a run needs besides tensors to go on as if it had never stopped."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    training_sha256: str = ""
    fingerprint: str | None = None
    metric: float | None = None
    metric_mode: str = "min"
    best_metric: float | None = None
    is_best: bool = False
    patience_metric: float | None = None
    evaluations_without_gain: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    skipped_in_a_row: int = 0
    loss_scale: dict[str, Any] | None = None
    tracker_ids: dict[str, str] = field(default_factory=dict)

    def advance(self, step: int, samples: int, tokens: int, finite: bool) -> None:
        """One step further: samples consumed in all, label tokens of this step, or a skip."""
        self.step, self.samples, self.tokens = step, samples, self.tokens + tokens
        self.metric, self.is_best = None, False
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self.skipped_steps.append(step)


def checkpoint_name(step: int) -> str:
    """The folder of a step: `step-00000200`."""
    return f"step-{step:08d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if _NAME.match(p.name)]
    return sorted((p for p in found if (p / "manifest.json").is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _NAME.match(path.name)
    assert match, path
    return int(match.group(1))


class SaveCadence:
    """When a checkpoint is due: by steps, by minutes, at a milestone, or at the best evaluation."""

    def __init__(self, spec: Checkpoint) -> None:
        self._spec, self._saved_when = spec, time.monotonic()

    def time_is_up(self) -> bool:
        """Whether every_minutes have gone by on this rank's clock; rank 0's is the one that counts."""
        minutes = self._spec.every_minutes
        return minutes is not None and time.monotonic() - self._saved_when >= 60 * minutes

    def is_due(self, state: TrainState) -> bool:
        """By the step count, or because this evaluation is the best so far."""
        counts = (self._spec.every_steps, self._spec.keep_every)
        is_best = self._spec.keep_best > 0 and state.is_best
        return is_best or any(count and state.step % count == 0 for count in counts)

    def saved(self) -> None:
        """Start counting minutes anew."""
        self._saved_when = time.monotonic()


class Saver:
    """Writes one rank's part of checkpoints, in a thread when asynchronous.

    `save` copies the state to host memory before it returns, so what is saved is the state at the
    call. A save waits for the one before it. `wait` raises what a save failed with.
    """

    def __init__(self, folder: Path, rank: int, world: int, attempt: int, spec: Checkpoint) -> None:
        self._folder, self._rank, self._world, self._spec = folder, rank, world, spec
        self._suffix = f"attempt-{attempt}.tmp"
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, pieces: Pieces, state: TrainState) -> None:
        """Begin to save this state; every rank calls it at the same step."""
        self.wait()
        snapshot = {
            name: Piece(piece.tensor.detach().to("cpu", copy=True), piece.shape, piece.start, True)
            for name, piece in pieces.items()
            if piece.owned
        }
        plain = asdict(state)
        if not self._spec.asynchronous:
            self._write(snapshot, plain)
            return
        self._thread = threading.Thread(target=self._guarded, args=(snapshot, plain), name="save")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is published on all ranks; raises its error."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _guarded(self, snapshot: Pieces, state: dict[str, Any]) -> None:
        try:
            self._write(snapshot, state)
        except BaseException as error:  # raised again by wait()
            self._error = error

    def _write(self, snapshot: Pieces, state: dict[str, Any]) -> None:
        name = checkpoint_name(state["step"])
        final, temporary = self._folder / name, self._folder / f".{name}.{self._suffix}"
        if (final / "manifest.json").is_file():
            return
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _write_rank(temporary, self._rank, snapshot)
            if self._rank == 0:
                self._publish(temporary, final, state)
            else:
                _wait_until(lambda: (final / "manifest.json").is_file(), temporary, final)
        except BaseException as error:
            with contextlib.suppress(OSError):
                (temporary / f"rank-{self._rank}.failed").write_text(str(error))
            if isinstance(error, OSError):
                message = f"{final}: rank {self._rank} cannot write: {error}"
                raise CheckpointError(message) from None
            raise

    def _publish(self, temporary: Path, final: Path, state: dict[str, Any]) -> None:
        """Rank 0, once every rank's manifest is there: the vote, the rename, retention."""
        manifests = [temporary / f"rank-{rank}.json" for rank in range(self._world)]
        _wait_until(lambda: all(path.is_file() for path in manifests), temporary, final)
        _write_durably(temporary / "state.json", json.dumps(state).encode())
        index = {"format": FORMAT_VERSION, "step": state["step"], "ranks": self._world}
        index["files"] = {  # type: ignore[assignment]
            path.name: _sha256(path.read_bytes()) for path in [*manifests, temporary / "state.json"]
        }
        _write_durably(temporary / "manifest.json", json.dumps(index).encode())
        _fsync_folder(temporary)
        if final.exists():  # what a deletion left: it has no manifest
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync_folder(self._folder)
        apply_retention(self._folder, self._spec)


def _write_rank(folder: Path, rank: int, snapshot: Pieces) -> None:
    """One rank's tensors and, last, the manifest that says they are on disk."""
    tensors = {name: piece.tensor.contiguous() for name, piece in snapshot.items()}
    entries = {
        name: {
            "shape": list(snapshot[name].shape),
            "start": snapshot[name].start,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.nbytes,
            "sha256": _tensor_sha256(tensor),
        }
        for name, tensor in tensors.items()
    }
    path = folder / f"rank-{rank}.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    _fsync_folder(folder)
    # The vote: from here on rank 0 may rename the folder, so nothing below may touch it.
    _write_durably(folder / f"rank-{rank}.json", json.dumps({"tensors": entries}).encode())


def verify(path: Path) -> TrainState:
    """Check every digest of a checkpoint; CheckpointError names the first thing that is wrong."""
    try:
        index = json.loads((path / "manifest.json").read_bytes())
        if index["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {index['format']}, not {FORMAT_VERSION}")
        for name, digest in index["files"].items():
            if _sha256((path / name).read_bytes()) != digest:
                raise CheckpointError(f"{path}/{name}: its digest is not the manifest's")
        for rank in range(index["ranks"]):
            _verify_rank(path, rank)
        return read_state(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_state(path: Path) -> TrainState:
    """The state.json of a checkpoint."""
    return TrainState(**json.loads((path / "state.json").read_bytes()))


def _verify_rank(path: Path, rank: int) -> None:
    entries = _entries(path, rank)
    with safe_open(path / f"rank-{rank}.safetensors", framework="pt") as file:
        for name, entry in entries.items():
            if _tensor_sha256(file.get_tensor(name)) != entry["sha256"]:
                raise CheckpointError(f"{path}: tensor {name} of rank {rank} is not what was saved")


def newest_sound(folder: Path, report: Callable[[str], None]) -> tuple[Path, TrainState] | None:
    """The newest checkpoint that verifies; each bad one is renamed `.bad-<n>` and reported."""
    for path in reversed(find_checkpoints(folder)):
        try:
            return path, verify(path)
        except CheckpointError as error:
            report(f"{error}; set aside, falling back to the one before")
            _set_aside(path)
    return None


def _set_aside(path: Path) -> None:
    number = 1
    while (path.parent / f"{path.name}.bad-{number}").exists():
        number += 1
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.parent / f"{path.name}.bad-{number}")


def load(path: Path, pieces: Pieces) -> None:
    """Fill this rank's tensors from a verified checkpoint, whatever split or engine wrote it."""
    index = json.loads((path / "manifest.json").read_bytes())
    stored: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for rank in range(index["ranks"]):
        for name, entry in _entries(path, rank).items():
            stored.setdefault(name, []).append((rank, entry))
    missing = sorted(set(pieces) ^ set(stored))
    if missing:
        side = "the checkpoint" if missing[0] in pieces else "this model"
        raise CheckpointError(f"{path}: {len(missing)} tensors differ; {side} lacks {missing[0]}")
    with contextlib.ExitStack() as stack:
        files = {
            rank: stack.enter_context(safe_open(path / f"rank-{rank}.safetensors", framework="pt"))
            for rank in range(index["ranks"])
        }
        for name, piece in pieces.items():
            _fill(piece, name, stored[name], files)


@torch.no_grad()
def _fill(piece: Piece, name: str, parts: list[tuple[int, dict[str, Any]]], files: Any) -> None:
    shape = tuple(parts[0][1]["shape"])
    if shape != piece.shape:
        raise CheckpointError(f"tensor {name}: {list(shape)} saved, {list(piece.shape)} here")
    if not shape:
        piece.tensor.copy_(files[parts[0][0]].get_tensor(name))
        return
    end = piece.start + piece.tensor.shape[0]
    for rank, entry in parts:
        stored = files[rank].get_slice(name)
        first = entry["start"]
        low, high = max(piece.start, first), min(end, first + stored.get_shape()[0])
        if low < high:
            target = piece.tensor[low - piece.start : high - piece.start]
            target.copy_(stored[low - first : high - first])


def remove_abandoned(folder: Path) -> None:
    """Delete what saves of earlier attempts left unpublished; before the first save of an attempt."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def apply_retention(folder: Path, spec: Checkpoint) -> None:
    """Keep the last n, the best n and every k-th; of the others the manifest goes first."""
    everything = find_checkpoints(folder)
    keep = set(everything[-spec.keep_last :])
    if spec.keep_every:
        keep |= {path for path in everything if step_of(path) % spec.keep_every == 0}
    scored = [(score, path) for path in everything if (score := _badness(path)) is not None]
    keep |= {path for _, path in sorted(scored, key=lambda pair: pair[0])[: spec.keep_best]}
    for path in everything:
        if path not in keep:
            with contextlib.suppress(OSError):
                (path / "manifest.json").unlink()
                shutil.rmtree(path)


def _badness(path: Path) -> float | None:
    """A checkpoint's evaluation metric, less being better; None where it was not evaluated."""
    with contextlib.suppress(OSError, ValueError):
        state = read_state(path)
        if state.metric is not None and math.isfinite(state.metric):
            return -state.metric if state.metric_mode == "max" else state.metric
    return None


def _entries(path: Path, rank: int) -> dict[str, Any]:
    return json.loads((path / f"rank-{rank}.json").read_bytes())["tensors"]  # type: ignore[no-any-return]


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    flat = (
        tensor.contiguous().flatten().view(torch.uint8)
        if tensor.ndim
        else tensor.reshape(1).view(torch.uint8)
    )
    return hashlib.sha256(flat.numpy()).hexdigest()  # type: ignore[arg-type]


def _write_durably(path: Path, raw: bytes) -> None:
    """Under a temporary name, fsynced, then renamed: a file of this name is whole."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wait_until(ready: Callable[[], bool], temporary: Path, final: Path) -> None:
    """Until the other ranks have done their part; a rank that failed is believed at once."""
    deadline = time.monotonic() + VOTE_TIMEOUT_S
    while not ready():
        failed = None
        with contextlib.suppress(FileNotFoundError):  # published, so renamed, while we looked
            failed = next(iter(temporary.glob("rank-*.failed")), None)
        if failed:
            raise CheckpointError(f"{final}: {failed.stem} failed: {failed.read_text()}")
        if time.monotonic() > deadline:
            raise CheckpointError(f"{final}: waited {VOTE_TIMEOUT_S:.0f} s for the other ranks")
        time.sleep(0.005)
