"""SIGKILL at every file operation of a save, in turn; run as a program, prints one JSON object.

Each trial forks two ranks that save step 2 over a sound step 1 (keep_last 1, so that the old one is
deleted at the end). One of them kills itself before or after its n-th operation, or within its
shard; the other is killed a moment later, as a supervisor would. Then a next start is made.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from savers import SHAPES, one_saver, pieces, save, tensors
from torch.distributed import FileStore

from drumline.checkpoint import retention
from drumline.checkpoint.boxes import whole as whole_box
from drumline.checkpoint.state import TrainState
from drumline.recipe.schema import Checkpoint
from drumline.train import loader, shard_writer
from drumline.train.commit import SaveCommit
from drumline.train.saver import Saver
from drumline.train.tensor_shard import TensorShard

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "link", "unlink", "rmdir")
WORLD = 2
FROZEN = ("model.a",)


def state_of(step: int) -> dict[str, torch.Tensor]:
    """The whole state of a step; the frozen weight is that of step 1, so that its file is linked."""
    first = tensors(1)
    return tensors(step) | {name: first[name] for name in FROZEN}


def die() -> None:
    """At once, without unwinding."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_operations(strike: Callable[[int, bool], None]) -> list[int]:
    """Wrap every file operation: `strike(n, after)` is called around the n-th (from 1)."""
    done = [0]

    def wrap(real: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            number = done[0]
            strike(number, False)
            try:
                return real(*arguments, **options)
            finally:
                strike(number, True)

        return counted

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return done


def tear_shard(share: float) -> None:
    """Die when this share of the shard's bytes has been written."""
    real = shard_writer.save_file

    def torn(what: Any, path: Path) -> None:
        real(what, path)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])
        die()

    shard_writer.save_file = torn


def rank_saves(folder: Path, store: Path, rank: int, trial: dict[str, Any]) -> None:
    """In a fork: one rank's save of step 2, with its death planted; exit code = operations done."""
    operations = [0]
    if trial["rank"] == rank:
        if "share" in trial:
            tear_shard(trial["share"])
        operations = count_operations(
            lambda n, after: die() if (n, after) == (trial["operation"], trial["after"]) else None
        )
    commit = SaveCommit(FileStore(str(store), WORLD), "run-0", rank, WORLD)
    ours = Saver(folder, Checkpoint(keep_last=1), commit, rank, saved_step=1)
    shards = pieces(state_of(2), rank, WORLD, True, FROZEN)
    ours.begin(shards)
    ours.save(shards, TrainState(step=2))
    ours.wait()
    os._exit(operations[0])


def one_trial(base: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """Two ranks, one death, one next start: which step it found, and what was wrong with it."""
    folder = base / "checkpoints"
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(base.parent / "sound", folder)
    pids = {}
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                rank_saves(folder, base / "store", rank, trial)
            finally:
                os._exit(250)
        pids[rank] = pid
    _, status = os.waitpid(pids[trial["rank"]], 0)
    if os.WIFSIGNALED(status):
        time.sleep(trial["pause"])
        os.kill(pids[1 - trial["rank"]], signal.SIGKILL)
    os.waitpid(pids[1 - trial["rank"]], 0)
    died = os.WIFSIGNALED(status)
    return {
        "died": died,
        "operations": None if died else os.WEXITSTATUS(status),
        **next_start(folder),
    }


def next_start(folder: Path) -> dict[str, Any]:
    """What a next attempt does: clear away, load the newest sound one, save step 2 (again)."""
    said: list[str] = []
    try:
        retention.remove_abandoned(folder)
        found = retention.newest_sound(folder, said.append)
        assert found
        path, state = found
        empty = {name: TensorShard(torch.full_like(tensor, 9.0), tuple(tensor.shape), whole_box(tensor.shape), True)
                 for name, tensor in tensors(1).items()}  # fmt: skip
        loader.load(path, empty)
        whole = state_of(state.step)
        mixed = [name for name in SHAPES if not torch.equal(whole[name], empty[name].tensor)]
        again = one_saver(folder, keep_last=1)
        again.save(pieces(tensors(3), 0, 1, False), TrainState(step=3))
        again.wait()
        left = sorted(p.name for p in folder.iterdir())
        return {"step": state.step, "mixed": mixed, "said": said, "left": left}
    except Exception as error:
        return {"step": None, "mixed": [], "said": said, "error": repr(error)}


def trials(counts: dict[int, int], least: int) -> list[dict[str, Any]]:
    """Every operation of every rank, before and after; torn shards; then at random, to `least`."""
    draw = random.Random(0)
    planned: list[dict[str, Any]] = []
    for rank, count in counts.items():
        planned += [{"rank": rank, "operation": n, "after": after} for n in range(1, count + 1)
                    for after in (False, True)]  # fmt: skip
        planned += [{"rank": rank, "operation": 0, "after": False, "share": share / 10}
                    for share in range(11)]  # fmt: skip
    while len(planned) < least:
        rank = draw.randrange(WORLD)
        planned.append({"rank": rank, "operation": draw.randint(1, counts[rank]),
                        "after": draw.random() < 0.5})  # fmt: skip
    return [{**trial, "pause": draw.choice([0, 0.002, 0.01])} for trial in planned]


def main() -> None:
    """All trials, in a folder of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "run"
        save(Path(name) / "sound", 1, WORLD, frozen=FROZEN)
        counts = {}
        for rank in range(WORLD):
            clean = one_trial(base, {"rank": rank, "operation": 0, "after": False, "pause": 0})
            assert clean["step"] == 2 and not clean["died"], clean
            counts[rank] = clean["operations"]
        results = [
            {**trial, **one_trial(base, trial)} for trial in trials(counts, int(sys.argv[1]))
        ]
    print(json.dumps({"counts": counts, "results": results}))


if __name__ == "__main__":
    main()
