"""How long does a save hold up training? Ours and torch's DCP, in turns, 100 MB to 4 GB.

Columns: what the loop waits for (ms, medians) in a synchronous save of ours, in an asynchronous one
the first time (after the steps in which its host buffers are made) and later, and in torch.distributed.checkpoint's
async_save, first and later; the whole time until ours is published; what SHA-256 costs as a share
of the synchronous save (of one core's time); the slowest step while ours and DCP's drain, against
the median step without a save, and the slowest of as many steps without a save (`none`), which a shared
machine has, too.

A second table has saves of ours of which a share is frozen weights, which are written once and linked after
that: MB that the first and each later one writes, ms that the loop waits.

    python benchmarks/checkpoint.py [--sizes 100 1000 4000] [--rounds 5] [--frozen 0 50 90]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from drumline.checkpoint.boxes import whole
from drumline.checkpoint.state import TrainState
from drumline.recipe.schema import Checkpoint
from drumline.train.commit import SaveCommit
from drumline.train.engines.base import TensorShard
from drumline.train.saver import Saver
from drumline.train.shard_writer import _digest

TENSORS = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 4000], help="MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frozen", type=int, nargs="*", default=[0, 50, 90], help="per cent")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {arguments.rounds} rounds")
    names = (
        "MB",
        "sync",
        "async 1st",
        "async",
        "DCP 1st",
        "DCP",
        "drain",
        "digests",
        "step ours",
        "DCP",
        "none",
    )
    print("".join(f"{name:>10}" for name in names))
    for size in arguments.sizes:
        print(row(size, arguments.rounds), flush=True)
    print(
        "".join(f"{n:>12}" for n in ("MB", "% frozen", "first, MB", "later, MB", "sync", "async"))
    )
    for size in arguments.sizes:
        for share in arguments.frozen:
            print(frozen_row(size, share, arguments.rounds), flush=True)
    dist.destroy_process_group()


def row(megabytes: int, rounds: int) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = megabytes * 1_000_000 // 4 // TENSORS
        tensors = {f"model.{n}": torch.randn(count) for n in range(TENSORS)}
        ours, theirs = Ours(folder, tensors), Dcp(folder, tensors)
        median_step = statistics.median(timed(step) for _ in range(20))
        found: dict[str, list[float]] = {}

        def note(key: str, value: float) -> None:
            found.setdefault(key, []).append(value)

        slowest_while(ours.is_preparing)
        note("async 1st", ours.blocking())
        ours.finish()
        note("DCP 1st", theirs.blocking())
        theirs.finish()
        for _ in range(rounds):
            note("sync", ours.synchronous())
            begun = time.perf_counter()
            note("async", ours.blocking())
            slowest, steps = slowest_while(ours.is_draining)
            note("ours step", slowest)
            ours.finish()
            note("drain", time.perf_counter() - begun)
            note("DCP", theirs.blocking())
            note("DCP step", slowest_while(theirs.is_draining)[0])
            theirs.finish()
            note("no save", max(timed(step) for _ in range(steps)))
            note("digests", timed(lambda: [_digest(tensor) for tensor in tensors.values()]))
        m = {key: statistics.median(values) for key, values in found.items()}
        times = [1e3 * m[key] for key in ("sync", "async 1st", "async", "DCP 1st", "DCP", "drain")]
        ratios = [m[key] / median_step for key in ("ours step", "DCP step", "no save")]
        return "".join(
            [f"{megabytes:>10}", *(f"{t:>10.0f}" for t in times), f"{m['digests'] / m['sync']:>10.0%}",
             *(f"{ratio:>9.2f}x" for ratio in ratios)]
        )  # fmt: skip


def frozen_row(megabytes: int, share: int, rounds: int) -> str:
    """One line of the second table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = megabytes * 1_000_000 // 4 // TENSORS
        tensors = {f"model.{n}": torch.randn(count) for n in range(TENSORS)}
        ours = Ours(folder, tensors, frozen=TENSORS * share // 100)
        waits: dict[str, list[float]] = {"sync": [], "async": []}
        written: list[float] = []
        known: set[int] = set()
        for _ in range(rounds + 1):
            waits["sync"].append(ours.synchronous())
            waits["async"].append(ours.blocking())
            ours.finish()
            files = {f.stat().st_ino: f.stat().st_size for f in folder.glob("ours-True/*/*")}
            written.append(sum(size for file, size in files.items() if file not in known) / 1e6)
            known = set(files)
        times = [1e3 * statistics.median(waits[key][1:]) for key in ("sync", "async")]
        parts = (megabytes, share, written[0], written[-1], *times)
        return "".join(f"{part:>12.0f}" for part in parts)


class Ours:
    """The product's saver, one rank; `frozen`: so many of its tensors need no gradient."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], frozen: int = 0) -> None:
        self._pieces = {
            name: TensorShard(t, tuple(t.shape), whole(t.shape), True, frozen=number < frozen)
            for number, (name, t) in enumerate(tensors.items())
        }
        store = dist.distributed_c10d._get_default_store()
        self._step = 0

        def saver(asynchronous: bool) -> Saver:
            where = folder / f"ours-{asynchronous}"
            where.mkdir()
            spec = Checkpoint(keep_last=1, **{"async": asynchronous})
            return Saver(where, spec, SaveCommit(store, str(asynchronous), 0, 1), 0)

        self._async, self._sync = saver(True), saver(False)
        for one in (self._async, self._sync):
            one.begin(self._pieces)

    def _save(self, saver: Saver) -> float:
        self._step += 1
        return timed(lambda: saver.save(self._pieces, TrainState(step=self._step)))

    def synchronous(self) -> float:
        """Seconds of a save that the loop waits for."""
        return self._save(self._sync)

    def blocking(self) -> float:
        """Seconds until an asynchronous save lets the loop go on."""
        return self._save(self._async)

    def is_preparing(self) -> bool:
        """Whether the host buffers of asynchronous saves are still being made, as during the first steps."""
        thread = self._async._making
        return thread is not None and thread.is_alive()

    def is_draining(self) -> bool:
        """Whether the save is still under way."""
        thread = self._async._thread
        return thread is not None and thread.is_alive()

    def finish(self) -> None:
        """Wait for the end of it."""
        self._async.wait()


class Dcp:
    """torch.distributed.checkpoint's asynchronous save, one rank."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._folder, self._tensors, self._step = folder, tensors, 0
        self._future: Any = None

    def blocking(self) -> float:
        """Seconds until it lets the loop go on."""
        self._step += 1
        where = str(self._folder / f"dcp-{self._step}")

        def begin() -> None:
            self._future = dcp.async_save(self._tensors, checkpoint_id=where)

        return timed(begin)

    def is_draining(self) -> bool:
        """Whether the save is still under way."""
        return not self._future.done()

    def finish(self) -> None:
        """Wait for the end of it, and delete the one before."""
        self._future.result()
        shutil.rmtree(self._folder / f"dcp-{self._step - 1}", ignore_errors=True)


_A = torch.randn(700, 700)


def step() -> None:
    """Some compute, as of a training step."""
    for _ in range(4):
        _A @ _A


def slowest_while(draining: Callable[[], bool]) -> tuple[float, int]:
    """The longest step until the save has ended, and the number of steps."""
    slowest, count = timed(step), 1
    while draining():
        slowest, count = max(slowest, timed(step)), count + 1
    return slowest, count


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
