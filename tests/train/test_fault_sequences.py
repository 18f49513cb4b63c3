"""Any few faults in any order: no step that a sound checkpoint covers is lost, no sound checkpoint is renamed.

The run is the real saver, loader and metrics file of one rank, without a model: each start chooses a checkpoint,
opens the metrics and trains some steps, as `train/loop.py` does. Real ranks meet the same faults in
`tests/distributed/test_survival.py`.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from savers import one_saver, pieces, tensors

from drumline.checkpoint.beginning import why_not_anew
from drumline.checkpoint.manifest import verify
from drumline.checkpoint.retention import find_checkpoints, find_set_aside, remove_abandoned
from drumline.checkpoint.state import TrainState
from drumline.errors import CheckpointError, CheckpointUnreadable
from drumline.metrics_file import Kind, MetricsFile, read_metrics
from drumline.train import loader

STEPS, EVERY = 5, 2


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(run: Path, kill_at: int | None = None) -> None:
    """An attempt of five steps, saving every two; killed after step `kill_at` of it."""
    remove_abandoned(run / "checkpoints")
    chosen = loader.choose(run / "checkpoints", run / "metrics.jsonl")
    metrics = MetricsFile(run / "metrics.jsonl", chosen.state.step)
    saver = one_saver(run / "checkpoints", keep_last=3)
    for step in range(chosen.state.step + 1, chosen.state.step + STEPS + 1):
        metrics.add(Kind.STEP, step=step, lr=1.0, loss=float(step))
        metrics.flush()
        if step % EVERY == 0:
            saver.save(pieces(tensors(step), 0, 1, False), TrainState(step=step))
            saver.wait()
            metrics.add(Kind.EVENT, step=step, **{"checkpoint/saved": 1.0})
            metrics.flush()
        if step - chosen.state.step == kill_at:
            break
    metrics.close()


def newest(run: Path) -> list[Path]:
    return find_checkpoints(run / "checkpoints")[-1:]


def flip(run: Path, name: str) -> None:
    for path in newest(run):
        raw = bytearray((path / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (path / name).write_bytes(raw)


def flip_all(run: Path) -> None:
    for path in find_checkpoints(run / "checkpoints"):
        (path / "state.json").write_bytes(b"{}")


def half_saved(run: Path) -> None:
    (run / "checkpoints/.step-00000099.tmp").mkdir(exist_ok=True)


def tear(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 9')


def unreadable(run: Path) -> None:
    """A start while the newest checkpoint's shard gives EIO; planted in os.open, as no disk here does it.

    One whose other files prove damage is set aside without its shard, and the one before is taken. Damage in
    the shard alone cannot be told while it gives EIO.
    """
    paths = {str(path / "rank-0.safetensors") for path in newest(run)}
    is_provable = False
    for path in newest(run):
        try:
            verify(path)
        except CheckpointError as error:
            is_provable = "rank-0.safetensors" not in str(error)
    real = os.open

    def failing(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path) in paths:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **more)

    with mock.patch.object(os, "open", failing):
        if paths and not is_provable:
            with pytest.raises(CheckpointUnreadable):
                start(run)
        elif paths:
            start(run)


def unmounted(run: Path) -> None:
    """A start while the folder of checkpoints is not there."""
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(CheckpointError):
        start(run)
    (run / "elsewhere").rename(run / "checkpoints")


def mounted_empty(run: Path) -> None:
    """A start while an empty folder is in its place."""
    had = bool(find_checkpoints(run / "checkpoints") or find_set_aside(run / "checkpoints"))
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").mkdir()
    if had:
        with pytest.raises(CheckpointError):
            start(run)
    shutil.rmtree(run / "checkpoints")
    (run / "elsewhere").rename(run / "checkpoints")


def lose_a_file(run: Path) -> None:
    for path in newest(run):
        (path / "rank-0.json").unlink(missing_ok=True)


FAULTS: dict[str, Callable[[Path], None]] = {
    "killed at once": lambda run: start(run, 0),
    "killed after a step": lambda run: start(run, 1),
    "killed after a save": lambda run: start(run, 2),
    "ended": start,
    "a flipped bit in a shard": lambda run: flip(run, "rank-0.safetensors"),
    "a flipped bit in the state": lambda run: flip(run, "state.json"),
    "a lost file": lose_a_file,
    "a save cut short": half_saved,
    "a torn line": tear,
    "a disk that gives EIO": unreadable,
    "a mount that is gone": unmounted,
    "a mount that is empty": mounted_empty,
    "all damaged": flip_all,
}


def sound(run: Path) -> list[tuple[str, int]]:
    found = []
    for path in find_checkpoints(run / "checkpoints"):
        try:
            found.append((path.name, verify(path).step))
        except CheckpointError:
            continue
    return found


def check(run: Path, before: list[tuple[str, int]], aside_before: list[str]) -> None:
    """What was sound is sound, or retention has newer ones; the metrics hold what the newest covers."""
    now = sound(run)
    aside = " ".join(set(find_set_aside(run / "checkpoints")) - set(aside_before))
    assert not any(name in aside for name, _ in before)
    covered = max((step for _, step in now), default=0)
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps[:covered] == list(range(1, covered + 1)), (steps, now)
    lost = [name for name, _ in before if name not in dict(now)]
    assert not lost or len(now) >= 3, (lost, now)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(FAULTS)), max_size=4))
@example(["ended", "a flipped bit in the state", "a disk that gives EIO"])
@example(["ended", "a flipped bit in a shard", "a disk that gives EIO"])
def test_any_four_faults_in_a_row(faults: list[str]) -> None:
    """After each fault and after the next start; where nothing sound is left, no start begins anew."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        (run / "checkpoints").mkdir()
        start(run, 3)
        for fault in faults:
            before, aside = sound(run), find_set_aside(run / "checkpoints")
            harms = fault.startswith(("a flipped", "a lost", "all"))
            try:
                FAULTS[fault](run)
            except CheckpointError:
                assert not sound(run)
            check(run, [] if harms else before, aside)
        before, aside = sound(run), find_set_aside(run / "checkpoints")
        metrics = (run / "metrics.jsonl").read_bytes()
        try:
            start(run)
            assert before or not why_not_anew(run / "checkpoints", run / "metrics.jsonl")
            check(run, before, aside)
        except CheckpointError:
            assert not before
            assert (run / "metrics.jsonl").read_bytes() == metrics
