"""Saving: copied to host memory, written beside, fsynced, voted, renamed; in a thread of its own."""

import contextlib
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from toolkit.checkpoint import manifest
from toolkit.checkpoint.manifest import DIGEST_THREADS, MANIFEST, checkpoint_name, shard_name
from toolkit.checkpoint.shelf import apply_retention, set_aside
from toolkit.checkpoint.state import MOST_SCORES, TrainState, badness
from toolkit.errors import CheckpointError, PeerLost
from toolkit.files import fsync_folder
from toolkit.recipe.schema import Checkpoint
from toolkit.train.engines.base import Piece
from toolkit.train.votes import Votes

DRAIN_S = 60.0
"""How long a rank that fails waits for its own save under way."""

_NICE = 5
_TICK_S = 0.5

Pieces = dict[str, Piece]


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

    `save` copies the state to host memory before it returns, into buffers that are kept: one copy,
    however many saves. A save waits for the one before it. Every rank learns the same verdict; an
    error is raised by `wait` on all of them or, with `on_error: continue`, told by `take_errors`.
    As a context it drains the save under way, also when the loop fails.
    """

    def __init__(
        self,
        folder: Path,
        spec: Checkpoint,
        votes: Votes,
        rank: int,
        saved_step: int = 0,
        before_publishing: Callable[[], None] = lambda: None,
        published: Callable[[int], None] = lambda step: None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._spec, self._votes, self._rank = folder, spec, votes, rank
        self._before_publishing, self._published = before_publishing, published
        self._recipe = recipe
        self._saved_step = saved_step
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._errors: list[str] = []
        self._lost = ""
        self._under_way: Path | None = None

    def save(self, pieces: Pieces, state: TrainState) -> None:
        """Begin to save this state; every rank calls it at the same step."""
        self.wait()
        if state.step == self._saved_step:  # nothing has moved since it was saved or loaded
            return
        self._saved_step = state.step
        _keep_score(state)
        owned = {name: piece for name, piece in pieces.items() if piece.owned}
        tensors = self._copied(owned) if self._spec.asynchronous else _on_host(owned)
        work = (tensors, owned, asdict(state))
        self._thread = threading.Thread(target=self._write, args=work, name="save", daemon=True)
        self._thread.start()
        if not self._spec.asynchronous:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether a save was refused by some rank and nobody has been told."""
        return bool(self._errors)

    def wait(self, tick: Callable[[], None] = lambda: None) -> None:
        """Until the save under way is decided; raises its error where `on_error` is `stop`.

        PeerLost when the ranks can no longer agree.
        """
        written = -1
        while self._thread:
            self._thread.join(_TICK_S)
            if not self._thread.is_alive():
                self._thread = None
            elif (now := self._bytes_written()) != written:  # a disk that stalls is no sign of life
                written = now
                tick()
        if self._lost:
            raise PeerLost(self._lost)
        if self._errors and self._spec.on_error == "stop":
            raise CheckpointError(self.take_errors()[0])

    def take_errors(self) -> list[str]:
        """What saves have failed with since last asked, in their order."""
        errors, self._errors = self._errors, []
        return errors

    def amend(self, state: TrainState) -> None:
        """After an evaluation that the saved state still lacked: rank 0 puts the whole state beside it.

        Every rank calls it; CheckpointError on all where it cannot be written.
        """
        _keep_score(state)
        error = [""]
        if self._rank == 0:
            path = self._folder / checkpoint_name(state.step)
            try:
                manifest.write_amendment(path, asdict(state))
            except OSError as failure:
                error = [f"{path}: rank 0 cannot write: {failure.strerror or failure}"]
        dist.broadcast_object_list(error, src=0)
        if error[0]:
            raise CheckpointError(error[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        if self._thread and kind:
            self._thread.join(DRAIN_S)

    def _copied(self, owned: Pieces) -> dict[str, Tensor]:
        """The state now, in host buffers that stay from save to save."""
        on_gpu = False
        for name, piece in owned.items():
            source = piece.tensor.detach()
            buffer = self._host.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._host[name] = buffer
            buffer.copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return self._host

    def _bytes_written(self) -> int:
        """By all ranks, to the save under way."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self._under_way.iterdir() if self._under_way else ():
                total += path.stat().st_size
        return total

    def _write(self, tensors: dict[str, Tensor], owned: Pieces, state: dict[str, Any]) -> None:
        if self._spec.asynchronous:  # the loop's threads come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        step = state["step"]
        final = self._folder / checkpoint_name(step)
        temporary = self._under_way = final.with_name(f".{final.name}.tmp")
        digest = failure = ""
        try:
            threads = 1 if self._spec.asynchronous else DIGEST_THREADS
            digest = _write_shard(temporary, self._rank, tensors, owned, threads)
            if self._rank == 0:
                self._before_publishing()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            failure = f"{final}: rank {self._rank} cannot write: {reason}"
        try:
            if failure:
                self._votes.fail(step, failure)
            else:
                self._votes.cast(step, digest)
            if self._rank == 0:
                refused = self._publish(temporary, final, state)
                self._votes.decide(step, refused)
            else:
                refused = self._votes.verdict(step)
        except RuntimeError as error:  # the store went with its process
            self._lost = f"{final}: the ranks cannot agree: {error}"
            return
        if refused:
            self._errors.append(refused)
            print(refused, flush=True)
            with contextlib.suppress(OSError):
                _remove_part(temporary, self._rank)

    def _publish(self, temporary: Path, final: Path, state: dict[str, Any]) -> str:
        """Rank 0, once every rank has voted: the manifest, the rename, retention; or the error."""
        digests, error = self._votes.collect(state["step"])
        if error:
            return error
        try:
            for rank in range(len(digests)):
                for name in (shard_name(rank), manifest.rank_manifest_name(rank)):
                    os.stat(temporary / name)
            manifest.write_manifest(temporary, state, digests, self._recipe)
            fsync_folder(temporary)
            if final.exists():
                set_aside(final)
            temporary.rename(final)
            fsync_folder(self._folder)
        except OSError as failure:
            return f"{final}: rank 0 cannot publish: {failure.strerror or failure}"
        self._published(state["step"])
        apply_retention(self._folder, self._spec, TrainState(**state))
        return ""


def _write_shard(
    folder: Path, rank: int, tensors: dict[str, Tensor], owned: Pieces, digest_threads: int
) -> str:
    """One rank's tensors, fsynced, and what they are; the digest of the latter."""
    folder.mkdir(exist_ok=True)
    path = folder / shard_name(rank)
    with ThreadPoolExecutor(digest_threads) as threads:
        digests = {name: threads.submit(_digest, tensor) for name, tensor in tensors.items()}
        save_file({name: tensor.reshape(-1) for name, tensor in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    described = {
        name: {
            "shape": list(owned[name].shape),
            "start": owned[name].start,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.nbytes,
            "sha256": digests[name].result(),
        }
        for name, tensor in tensors.items()
    }
    digest = manifest.write_rank_manifest(folder, rank, described)
    fsync_folder(folder)
    return digest


def _remove_part(temporary: Path, rank: int) -> None:
    """Give back the disk space of a save that came to nothing."""
    for path in [*temporary.glob(f"rank-{rank}.*"), *temporary.glob(f".rank-{rank}.*")]:
        path.unlink(missing_ok=True)
    if rank == 0:
        for name in (MANIFEST, manifest.STATE):
            (temporary / name).unlink(missing_ok=True)
    if temporary.exists() and not any(temporary.iterdir()):
        shutil.rmtree(temporary, ignore_errors=True)


def _on_host(owned: Pieces) -> dict[str, Tensor]:
    """Without a copy where they are there already, for a save that the loop waits for."""
    return {name: piece.tensor.detach().cpu().contiguous() for name, piece in owned.items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()  # type: ignore[arg-type]


def _keep_score(state: TrainState) -> None:
    """Note that this step is saved with its metric; retention picks the best of those that exist."""
    if state.metric is not None and math.isfinite(state.metric):
        state.scores[str(state.step)] = state.metric
    best = sorted(state.scores.items(), key=lambda pair: badness(state, pair[1]))
    state.scores = dict(best[:MOST_SCORES])
