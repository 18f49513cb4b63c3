"""Saves checkpoints in a thread: copy to host memory, write a temporary folder, fsync, commit, rename."""

import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from drumline.checkpoint import manifest
from drumline.checkpoint.manifest import MANIFEST, checkpoint_name
from drumline.checkpoint.retention import apply_retention, set_aside
from drumline.checkpoint.shards import DIGEST_THREADS, rank_manifest_name, shard_name
from drumline.checkpoint.state import MOST_SCORES, TrainState, badness
from drumline.errors import CheckpointError, PeerLost
from drumline.files import fsync_folder
from drumline.plan.steps import Clock, is_due
from drumline.recipe.evaluation_section import After
from drumline.recipe.schema import Checkpoint
from drumline.train.commit import SaveCommit
from drumline.train.shard_writer import Shards, ShardWriter, on_host

DRAIN_S = 60.0
"""Seconds that a failing rank waits for its own save in progress."""

_NICE = 5
_TICK_S = 0.5

SAVE_GRACE_S = 60.0
_SLOWER = 10.0
"""A save counts as stuck when it is this many times slower than the slowest rate measured."""
_UNMEASURED_BYTES_PER_S = 20e6
"""Write rate assumed until the first save is measured, that of the slowest disk."""


class SaveCadence:
    """When a checkpoint is due: by steps or minutes, at a milestone or the best evaluation, for a command."""

    def __init__(
        self, spec: Checkpoint, clock: Clock | None = None, after: Sequence[After] = ()
    ) -> None:
        self._spec, self._clock, self._after = spec, clock, after
        self._saved_when = time.monotonic()

    def time_is_up(self) -> bool:
        """Whether `every_minutes` have passed on this rank's clock; the loop uses rank 0's answer only."""
        minutes = self._spec.every_minutes
        return minutes is not None and time.monotonic() - self._saved_when >= 60 * minutes

    def is_due(self, state: TrainState) -> bool:
        """Whether a save is due by the step count, or because this evaluation is the best so far."""
        spec = self._spec
        is_best = spec.keep_best > 0 and state.is_best
        is_kept = spec.keep_every is not None and state.step % spec.keep_every == 0
        by_count = is_due(state.step, spec.every_steps, spec.every_epochs, self._clock)
        return is_best or is_kept or by_count or is_owed(state.step, self._after, self._clock)

    def saved(self) -> None:
        """Restart the count of minutes."""
        self._saved_when = time.monotonic()


def is_owed(step: int, after: Sequence[After], clock: Clock | None) -> bool:
    """Whether a checkpoint of this step is owed one of these commands."""
    return any(is_due(step, one.every_steps, one.every_epochs, clock) for one in after)


class Saver:
    """Writes one rank's part of each checkpoint in a thread, which `save` waits for unless asynchronous.

    When asynchronous, `save` returns once the state is copied to host buffers, which later saves reuse. A
    save first waits for the one before it. Every rank gets the same verdict: with `on_error: stop`, `wait`
    raises the error on all ranks; with `continue`, `take_errors` returns it. Leaving the context after an
    exception waits up to `DRAIN_S` for the save in progress.
    """

    def __init__(
        self,
        folder: Path,
        spec: Checkpoint,
        commit: SaveCommit,
        rank: int,
        *,
        saved_step: int = 0,
        before_publishing: Callable[[], None] = lambda: None,
        published: Callable[[int], None] = lambda step: None,
        recipe: dict[str, Any] | None = None,
        waits: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._waits = waits
        self._folder, self._spec, self._commit, self._rank = folder, spec, commit, rank
        self._before_publishing, self._published = before_publishing, published
        self._recipe = recipe
        self._saved_step = saved_step
        self._writer = ShardWriter(folder, rank, saved_step)
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._making: threading.Thread | None = None
        self._errors: list[str] = []
        self._lost = ""
        self._under_way: Path | None = None
        self._bytes = 0
        self._bytes_per_s: float | None = None

    def begin(self, shards: Shards) -> None:
        """Before the first step: note the frozen weights, and begin to make the host buffers of the others.

        While a frozen weight stays as it is, it is not copied: its file is written once, and linked from
        checkpoint to checkpoint.
        """
        owned = _owned(shards)
        frozen = self._writer.begin(owned)
        if self._spec.asynchronous:
            changing = [(n, shard.tensor) for n, shard in owned.items() if n not in frozen]
            self._making = threading.Thread(
                target=self._make_buffers, args=(changing,), name="save-buffers", daemon=True
            )
            self._making.start()

    def save(self, shards: Shards, state: TrainState, is_final: bool = False) -> None:
        """Start to save this state; every rank calls it at the same step.

        `is_final`: the run's last save, which also writes the weight sums of `checkpoint/weights.py`.
        """
        self.wait()
        if state.step == self._saved_step:  # unchanged since it was saved or loaded
            return
        self._saved_step = state.step
        _keep_score(state)
        owned = _owned(shards)
        self._bytes = sum(shard.tensor.nbytes for shard in owned.values())
        frozen = self._writer.unchanged(owned)
        changed = {name: shard for name, shard in owned.items() if name not in frozen}
        tensors = self._copied(changed) if self._spec.asynchronous else on_host(changed)
        work = (tensors, frozen, owned, asdict(state), is_final)
        self._thread = threading.Thread(target=self._write, args=work, name="save", daemon=True)
        self._thread.start()
        if not self._spec.asynchronous:
            self.wait()

    def limit_of(self, shards: Shards) -> float:
        """`limit_s` for the shards that this rank is about to save."""
        return self.limit_s(sum(shard.tensor.nbytes for shard in _owned(shards).values()))

    def limit_s(self, size: int | None = None) -> float:
        """Seconds that saving `size` bytes (default: this rank's) may take, from the slowest rate measured.

        Independent of `launch.hang_timeout_s`: a large checkpoint on a slow disk is not a hang.
        """
        size = self._bytes if size is None else size
        if self._bytes_per_s is None:
            return SAVE_GRACE_S + size / _UNMEASURED_BYTES_PER_S
        return SAVE_GRACE_S + _SLOWER * size / self._bytes_per_s

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed on some rank and `take_errors` has not returned the error yet."""
        return bool(self._errors)

    def wait(self, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until the save in progress is committed or refused, calling `tick` while bytes are written.

        CheckpointError where it failed and `on_error` is `stop`; PeerLost when the ranks cannot commit.
        """
        written = -1
        while self._thread:
            self._thread.join(_TICK_S)
            if not self._thread.is_alive():
                self._thread = None
            elif (now := self._bytes_written()) != written:  # no tick while the disk stalls
                written = now
                tick()
        if self._lost:
            raise PeerLost(self._lost)
        if self._errors and self._spec.on_error == "stop":
            raise CheckpointError(self.take_errors()[0])

    def take_errors(self) -> list[str]:
        """Errors of the saves that failed since the last call, oldest first."""
        errors, self._errors = self._errors, []
        return errors

    def amend(self, state: TrainState) -> None:
        """Add the result of an evaluation made after a resume to the loaded checkpoint, as amendment.json.

        Checkpoints that are no longer the best are deleted, as after a save. Every rank calls it and rank 0
        writes; CheckpointError on all ranks where that fails.
        """
        _keep_score(state)
        error = [""]
        if self._rank == 0:
            path = self._folder / checkpoint_name(state.step)
            try:
                manifest.write_amendment(path, asdict(state))
                apply_retention(self._folder, self._spec, state, self._waits)
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

    def _copied(self, changed: Shards) -> dict[str, Tensor]:
        """Copy the tensors to host buffers (pinned for GPU tensors) that all saves reuse."""
        if self._making:
            self._making.join()
            self._making = None
        on_gpu = False
        for name, shard in changed.items():
            source = shard.tensor.detach()
            buffer = self._host.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = self._host[name] = _buffer_for(source)
            buffer.copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._host[name] for name in changed}

    def _make_buffers(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Allocate and touch the host buffers in a thread, while the first steps are trained.

        New memory costs several times what a copy into it does, which the first save would wait for.
        """
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        with contextlib.suppress(RuntimeError):  # too little memory: the first save tells it
            for name, tensor in tensors:
                if tensor.is_cuda:  # a thread's own device is the first one
                    torch.cuda.set_device(tensor.device)
                self._host[name] = _buffer_for(tensor).zero_()

    def _bytes_written(self) -> int:
        """Bytes that all ranks have written to the save in progress."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self._under_way.iterdir() if self._under_way else ():
                total += path.stat().st_size
        return total

    def _write(
        self,
        tensors: dict[str, Tensor],
        frozen: Shards,
        owned: Shards,
        state: dict[str, Any],
        is_final: bool,
    ) -> None:
        if self._spec.asynchronous:  # the training threads have priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        step = state["step"]
        final = self._folder / checkpoint_name(step)
        temporary = self._under_way = final.with_name(f".{final.name}.tmp")
        digest = failure = ""
        try:
            threads = 1 if self._spec.asynchronous and not is_final else DIGEST_THREADS
            self._commit.begin(step, self._bytes)
            began = time.monotonic()
            written = self._writer.write(
                temporary, tensors, frozen, owned, threads=threads, is_final=is_final
            )
            digest = written.digest
            self._measure(written.bytes, time.monotonic() - began)
            if self._rank == 0:
                self._before_publishing()
        except Exception as error:  # any failure must reach the other ranks
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            failure = f"{final}: rank {self._rank} cannot write: {reason}"
        try:
            if failure:
                self._commit.fail(step, failure)
            else:
                self._commit.ready(step, digest)
            if self._rank == 0:
                refused = self._publish(temporary, final, state)
                self._commit.decide(step, refused)
            else:
                refused = self._commit.verdict(step)
            if not refused:
                self._writer.published(final)
        except RuntimeError as error:  # the process that hosts the store has ended
            self._lost = f"{final}: the ranks cannot agree: {error}"
            return
        if refused:
            self._errors.append(refused)
            print(refused, flush=True)
            with contextlib.suppress(OSError):
                _remove_part(temporary, self._rank)

    def _measure(self, size: int, seconds: float) -> None:
        """Record the slowest write rate, in bytes per second."""
        if size:
            rate = size / max(seconds, 1e-3)
            self._bytes_per_s = min(rate, self._bytes_per_s or rate)

    def _publish(self, temporary: Path, final: Path, state: dict[str, Any]) -> str:
        """On rank 0: collect all reports, write the manifest, rename, apply retention; returns any error."""
        digests, error = self._commit.collect(state["step"], self.limit_s)
        if error:
            return error
        try:
            for rank in range(len(digests)):
                for name in (shard_name(rank), rank_manifest_name(rank)):
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
        apply_retention(self._folder, self._spec, TrainState(**state), self._waits)
        return ""


def _buffer_for(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _owned(shards: Shards) -> Shards:
    return {name: shard for name, shard in shards.items() if shard.owned}


def _remove_part(temporary: Path, rank: int) -> None:
    """Delete this rank's files of a save that was refused."""
    for path in [*temporary.glob(f"rank-{rank}.*"), *temporary.glob(f".rank-{rank}.*")]:
        path.unlink(missing_ok=True)
    if rank == 0:
        for name in (MANIFEST, manifest.STATE):
            (temporary / name).unlink(missing_ok=True)
    if temporary.exists() and not any(temporary.iterdir()):
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_score(state: TrainState) -> None:
    """Record the metric of this saved step; retention ranks the existing checkpoints by it."""
    if state.metric is not None and math.isfinite(state.metric):
        state.scores[str(state.step)] = state.metric
    best = sorted(state.scores.items(), key=lambda pair: badness(state, pair[1]))
    state.scores = dict(best[:MOST_SCORES])
