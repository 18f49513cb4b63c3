"""Runs a list of jobs on real gloo processes, forked from one that has imported everything."""

import atexit
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = f"{ROOT}/toolkit:{ROOT}/launchers"
_IMPORTED = (
    "accelerate",
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "peft",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "drumline.train.loop",
    "drumline.train.verify",
)
"""What a job would import by itself, in each rank again; DeepSpeed's muon takes 2 s."""


def run_jobs(world: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Start `world` processes that do the jobs in turn; raises with the log of one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "PYTHONPATH": SOURCES, "STORE": str(folder / "store")}  # fmt: skip
        with (folder / f"rank-{rank}.log").open("wb") as log:
            argv = [str(folder / "jobs.json")]
            ranks.append(_server().program("jobs", argv, Path.cwd(), env, log.fileno()))
    codes = []
    try:
        for connection, _ in ranks:
            connection.settimeout(400)
            codes.append(int(connection.recv(64).decode() or 1))
    finally:
        for _, pid in ranks[len(codes) :]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if any(codes):
        logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world)]
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(logs))


@cache
def _server() -> ForkServer:
    """What forks the ranks, until the tests end."""
    folder = tempfile.TemporaryDirectory(prefix="ranks-")
    server = ForkServer(Path(folder.name), *_IMPORTED)
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


def main(jobs: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for job in json.loads(Path(jobs).read_text()):
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

    from drumline.plan.model import read_plan
    from drumline.train.loop import train
    from drumline.train.watch import Watch

    watch = Watch()
    last_rank = dist.get_rank() == dist.get_world_size() - 1
    watch.stop_asked = lambda: last_rank and watch.step == stop_after

    where = Path(folder)
    (where / "checkpoints").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    attempt = 0 if not (where / "metrics.jsonl").exists() else 1
    outcome = train(
        read_plan(Path(plan).read_text()), where, torch.device("cpu"), attempt=attempt, watch=watch
    )
    if dist.get_rank() == 0:
        (where / "outcome.json").write_text(json.dumps(vars(outcome)))


def gradient_job(plan: str, out: str, step: int) -> None:
    """The gradient of one step in fp64, whole, saved by rank 0."""
    import torch
    import torch.distributed as dist

    from drumline.plan.model import read_plan
    from drumline.train.batches import StepReader, open_rows
    from drumline.train.engines.torch import TorchEngine

    the_plan = read_plan(Path(plan).read_text())
    rows = open_rows(the_plan, "train")
    engine = TorchEngine(the_plan, rows.manifest, torch.device("cpu"), dtype=torch.float64)
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

    from drumline.checkpoint.manifest import verify
    from drumline.plan.model import read_plan
    from drumline.train import loader
    from drumline.train.batches import open_rows
    from drumline.train.commit import SaveCommit
    from drumline.train.engines import build_engine
    from drumline.train.saver import Saver

    the_plan = read_plan(Path(plan).read_text())
    rows = open_rows(the_plan, "train")
    engine = build_engine(the_plan, rows.manifest, torch.device("cpu"))
    loader.load(Path(source), engine.shards())
    engine.loaded()
    (Path(folder) / "checkpoints").mkdir(exist_ok=True)
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    commit = SaveCommit(store, Path(folder).name, dist.get_rank(), dist.get_world_size())
    saver = Saver(Path(folder) / "checkpoints", the_plan.recipe.checkpoint, commit, dist.get_rank())
    saver.save(engine.shards(), verify(Path(source)))
    saver.wait()


def verify_job(plan: str, folder: str, fault: str) -> None:
    """The real verification, with a fault planted in the engine."""
    import torch

    from drumline.plan.model import read_plan
    from drumline.train.verify import verify
    from drumline.train.watch import Watch

    with planted(fault):
        verify(read_plan(Path(plan).read_text()), Path(folder), torch.device("cpu"), Watch())


def count_load_job(plan: str, source: str, out: str) -> None:
    """Load a checkpoint, counting what this rank parses, opens and reads."""
    import torch
    import torch.distributed as dist

    from drumline.plan.model import read_plan
    from drumline.train import loader
    from drumline.train.batches import open_rows
    from drumline.train.engines import build_engine

    the_plan = read_plan(Path(plan).read_text())
    engine = build_engine(the_plan, open_rows(the_plan, "train").manifest, torch.device("cpu"))
    shards = engine.shards()
    found: dict[str, Any] = {"manifests": [], "opened": [], "tensors": [], "held": len(shards)}
    kept = loader.read_entries, loader.safe_open, loader._read, loader._rest_shared_out

    def entries(path: Path, rank: int) -> Any:
        found["manifests"].append(rank)
        return kept[0](path, rank)

    def opened(path: Path, **options: Any) -> Any:
        found["opened"].append(path.name)
        return kept[1](path, **options)

    def read(shard: Any, parts: Any) -> None:
        found["tensors"] += [name for name, one in shards.items() if one is shard]
        kept[2](shard, parts)

    def shared_out(path: Path, told: Any, is_part: bool) -> Any:
        found["asked"] = sorted(name for group in told.needed for name in group.names)
        found["told"] = sorted(name for group in told.saved for name in group.names)
        return kept[3](path, told, is_part)

    loader.read_entries, loader.safe_open, loader._read = entries, opened, read
    loader._rest_shared_out = shared_out
    try:
        loader.load(Path(source), shards)
    finally:
        loader.read_entries, loader.safe_open, loader._read, loader._rest_shared_out = kept
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(found))


def count_build_job(plan: str, out: str) -> None:
    """Build the model: what this rank draws, what counts as progress, and the weights' digest."""
    import hashlib

    import torch
    import torch.distributed as dist

    from drumline.plan.model import read_plan
    from drumline.train.batches import open_rows
    from drumline.train.engines import build_engine
    from drumline.train.models import builder

    the_plan = read_plan(Path(plan).read_text())
    manifest = open_rows(the_plan, "train").manifest
    drawn: list[str] = []
    progress: list[str] = []
    real = builder.derived_seed

    def seed(*parts: Any) -> int:
        if parts[0] == "init":
            drawn.append(parts[2])
        return real(*parts)

    def digest(named: Any) -> str:
        sums = hashlib.sha256()
        for name, value in sorted(named):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            sums.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
        return sums.hexdigest()

    builder.derived_seed = seed
    try:
        engine = build_engine(the_plan, manifest, torch.device("cpu"), progress.append)
    finally:
        builder.derived_seed = real
    weights = digest(engine._parameters.items())
    builder._world, builder._rank, kept = (lambda: 1), (lambda: 0), (builder._world, builder._rank)
    try:
        alone = digest(builder.ModelBuilder(the_plan.recipe, manifest).whole().named_parameters())
    finally:
        builder._world, builder._rank = kept
    found = {"drawn": drawn, "progress": progress, "weights": weights, "alone": alone}
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(found))


def count_step_job(plan: str, out: str) -> None:
    """Train with the noise meter on where it can be; count collectives, and what would make a host wait for its device in each step."""
    import dataclasses
    import gc
    import tempfile

    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from drumline.plan.model import read_plan
    from drumline.train.loop import train
    from drumline.train.watch import Watch

    the_plan = read_plan(Path(plan).read_text())
    is_seen = the_plan.recipe.strategy.reduce == "micro_batch"  # a micro-batch's gradient
    logging = the_plan.recipe.logging.model_copy(update={"noise_scale": is_seen})
    checkpoint = the_plan.recipe.checkpoint.model_copy(update={"every_steps": None})
    recipe = the_plan.recipe.model_copy(update={"logging": logging, "checkpoint": checkpoint})
    the_plan = dataclasses.replace(the_plan, recipe=recipe)
    counts = {"reads": 0, "copies": 0, "steps": 0, "collections": 0}
    collectives: Counter[str] = Counter()
    is_on = False

    class Counting(TorchDispatchMode):
        """Sees every operator of this thread."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
                return NotImplemented
            if is_on and func is torch.ops.aten._local_scalar_dense.default:
                counts["reads"] += 1
            if is_on and func is torch.ops.aten.lift_fresh.default:
                counts["copies"] += 1
            name = func.name().partition("::")[2].strip("_")
            is_own = func.namespace in ("c10d", "_c10d_functional")
            if is_on and is_own and not name.startswith(("wait", "wrap")):
                collectives[name] += 1
            return func(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist

    def counted_tolist(tensor: Any) -> Any:
        counts["reads"] += is_on
        return tolist(tensor)

    def entered(heartbeat: Any) -> None:
        nonlocal is_on
        phase = str(heartbeat.phase)
        counts["steps"] += phase == "begin"
        is_on = phase in ("begin", "forward", "backward", "step reduce", "update")

    def collected(phase: str, info: Any) -> None:
        counts["collections"] += is_on and phase == "start"

    torch.Tensor.tolist = counted_tolist  # type: ignore[method-assign]
    gc.callbacks.append(collected)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(str(shared[0]))
    (folder / "checkpoints").mkdir(exist_ok=True)
    dist.barrier()
    try:
        with Counting():
            train(the_plan, folder, torch.device("cpu"), watch=Watch(heartbeat=entered))
    finally:
        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        gc.callbacks.remove(collected)
    found = {**counts, "collectives": collectives}
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(found))


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """What other tools get wrong, put into ours."""
    import torch.distributed as dist

    from drumline.train import verify
    from drumline.train.engines.torch import TorchEngine

    kept = TorchEngine.accumulate, TorchEngine._set_rate, verify.silence_dropout

    def accumulate(self: Any, tensors: Any, first_slot: int, weight: float, **rest: Any) -> Any:
        k, world = self.plan.batch.accumulation, self.averaging_ranks
        if fault == "mean of means":  # each micro-batch's own mean, then the mean of those
            counted = float((tensors["targets"] != -100).sum())
            weight = (counted or 1.0) * k * world
        if fault == "doubled 1/k":
            weight *= k
        return kept[0](self, tensors, first_slot, weight, **rest)

    def set_rate(self: Any, rate: float) -> None:
        kept[1](self, rate * (self.averaging_ranks if fault == "a tick per process" else 1))

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


_LARGE, _GLOO_IS_DONE_S = 1 << 20, 0.01


def record_zero_job(plan: str, out: str) -> None:
    """Record every allocation of two real steps under DeepSpeed; rank 0 writes the peak of each phase.

    Rows are random, so that no step is skipped. Garbage is controlled as in `train`. Gloo's thread drops a
    tensor that it has reduced a moment after the collective has returned, which NCCL has no thread for, so each
    large allocation waits for that.
    """
    import gc
    import time

    import torch
    import torch.distributed as dist

    from drumline.plan.model import read_plan
    from drumline.trace.recorder import Recorder
    from drumline.trace.rehearse import blank_manifest, rehearsal_batch, step_of
    from drumline.train.engines.deepspeed import DeepSpeedEngine
    from drumline.train.garbage import GarbageControl
    from drumline.train.loop import forward_backward
    from drumline.train.watch import Watch

    class SettledRecorder(Recorder):
        def _born(self, key: int, size: int, *more: Any) -> None:
            if size > _LARGE:
                time.sleep(_GLOO_IS_DONE_S)
            super()._born(key, size, *more)

    the_plan = read_plan(Path(plan).read_text())
    manifest, recorder = blank_manifest(the_plan), SettledRecorder()
    with GarbageControl(), recorder:
        recorder.phase("load")
        engine = DeepSpeedEngine(the_plan, manifest, torch.device("cpu"))
        tensors = rehearsal_batch(the_plan, manifest, the_plan.batch.per_device)
        tensors["weights"].fill_(1.0)
        for name in ("input_ids", "targets"):
            tensors[name].random_(0, 1000)
        step = step_of(the_plan, tensors, the_plan.batch.accumulation)
        for _ in range(2):
            recorder.phase("backward")
            losses = forward_backward(engine, step, Watch())
            recorder.phase("optimizer step")
            norm = engine.clip(1.0)
            engine.step(1e-4)
            recorder.phase("between")
            assert torch.isfinite(norm)
            del losses, norm
    gc.unfreeze()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(recorder.recording.peaks_by_phase()))


JOBS = {
    "record zero": record_zero_job,
    "train": train_job,
    "gradient": gradient_job,
    "verify": verify_job,
    "reload": reload_job,
    "count_load": count_load_job,
    "count_build": count_build_job,
    "count_step": count_step_job,
}
