"""Runs a list of jobs on real gloo processes, all in one start, because a start costs seconds.

As a program it is one rank: `python ranks.py JOBS.json`, with RANK and WORLD_SIZE set.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_jobs(world: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Start `world` processes that do the jobs in turn; raises with the log of one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    processes = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "PYTHONPATH": str(ROOT), "STORE": str(folder / "store")}  # fmt: skip
        with (folder / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, __file__, str(folder / "jobs.json")]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world)]
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(logs))


def main() -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        JOBS[job.pop("kind")](**job)
        forget_accelerate()
        dist.barrier()
    dist.destroy_process_group()


def forget_accelerate() -> None:
    """Its state is one for the whole process; the next job may want another precision."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()
        PartialState._reset_state()


def train_job(plan: str, folder: str, stop_after: int | None = None) -> None:
    """The real loop; `stop_after` n steps as if a signal had come to the last rank."""
    import torch
    import torch.distributed as dist

    from toolkit.plan.model import read_plan
    from toolkit.train.loop import train
    from toolkit.train.watch import Watch

    watch = Watch()
    last_rank = dist.get_rank() == dist.get_world_size() - 1
    watch.stop_asked = lambda: last_rank and watch.step == stop_after

    where = Path(folder)
    (where / "checkpoints").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    attempt = 0 if not (where / "metrics.jsonl").exists() else 1
    outcome = train(read_plan(Path(plan).read_text()), where, torch.device("cpu"), attempt, watch)
    if dist.get_rank() == 0:
        (where / "outcome.json").write_text(json.dumps(vars(outcome)))


def gradient_job(plan: str, out: str, step: int) -> None:
    """The gradient of one step in fp64, whole, saved by rank 0."""
    import torch
    import torch.distributed as dist

    from toolkit.data.rows import Rows
    from toolkit.plan.model import read_plan
    from toolkit.train.batches import StepReader
    from toolkit.train.engines.torch import TorchEngine

    the_plan = read_plan(Path(plan).read_text())
    rows = Rows(Path(the_plan.data.cache or ""), "train")
    engine = TorchEngine(the_plan, rows.card, torch.device("cpu"), dtype=torch.float64)
    work = StepReader(the_plan, rows, dist.get_rank()).read(step)
    last = len(work.micro_batches) - 1
    for number, micro_batch in enumerate(work.micro_batches):
        engine.accumulate(micro_batch.tensors, micro_batch.first_slot, work.weight, step=step,
                          dummy=micro_batch.is_dummy, last=number == last)  # fmt: skip
    whole = dict(engine.gradients())
    if dist.get_rank() == 0:
        torch.save(whole, out)


def reload_job(plan: str, folder: str, source: str) -> None:
    """Load a checkpoint and save it again, without a step between."""
    import torch
    import torch.distributed as dist

    from toolkit.checkpoint.manifest import verify
    from toolkit.data.rows import Rows
    from toolkit.plan.model import read_plan
    from toolkit.train import loader
    from toolkit.train.engines import build_engine
    from toolkit.train.saver import Saver
    from toolkit.train.votes import Votes

    the_plan = read_plan(Path(plan).read_text())
    rows = Rows(Path(the_plan.data.cache or ""), "train")
    engine = build_engine(the_plan, rows.card, torch.device("cpu"))
    loader.load(Path(source), engine.pieces())
    engine.loaded()
    (Path(folder) / "checkpoints").mkdir(exist_ok=True)
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    votes = Votes(store, Path(folder).name, dist.get_rank(), dist.get_world_size(), 60.0)
    saver = Saver(Path(folder) / "checkpoints", the_plan.recipe.checkpoint, votes, dist.get_rank())
    saver.save(engine.pieces(), verify(Path(source)))
    saver.wait()


def verify_job(plan: str, folder: str, fault: str) -> None:
    """The real verification, with a fault planted in the engine."""
    import torch

    from toolkit.plan.model import read_plan
    from toolkit.train.verify import verify
    from toolkit.train.watch import Watch

    with planted(fault):
        verify(read_plan(Path(plan).read_text()), Path(folder), torch.device("cpu"), Watch())


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """What other tools get wrong, put into ours."""
    import torch.distributed as dist

    from toolkit.train import verify
    from toolkit.train.engines.torch import TorchEngine

    kept = TorchEngine.accumulate, TorchEngine._set_rate, verify.silence_dropout

    def accumulate(self: Any, tensors: Any, first_slot: int, weight: float, **rest: Any) -> Any:
        k, world = self.plan.batch.accumulation, self.world
        if fault == "mean of means":  # each micro-batch's own mean, then the mean of those
            counted = float((tensors["targets"] != -100).sum())
            weight = (counted or 1.0) * k * world
        if fault == "doubled 1/k":
            weight *= k
        return kept[0](self, tensors, first_slot, weight, **rest)

    def set_rate(self: Any, rate: float) -> None:
        kept[1](self, rate * (self.world if fault == "a tick per process" else 1))

    def silence(module: Any) -> None:
        if fault != "dropout on one rank" or dist.get_rank() == 0:
            kept[2](module)

    TorchEngine.accumulate, TorchEngine._set_rate, verify.silence_dropout = (
        accumulate,
        set_rate,
        silence,
    )  # type: ignore
    try:
        yield
    finally:
        TorchEngine.accumulate, TorchEngine._set_rate, verify.silence_dropout = kept  # type: ignore


JOBS = {"train": train_job, "gradient": gradient_job, "verify": verify_job, "reload": reload_job}

if __name__ == "__main__":
    main()
