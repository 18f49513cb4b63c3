"""What does drumline's loop cost per step, under each engine, and what do peers cost?

    python benchmarks/step_overhead.py [--rounds 5] [--steps 60] [--only small]
    python benchmarks/step_overhead.py --instructions [--only small]

The same model, data, optimizer and two gloo processes; each loop in processes of its own, in turns. A step's
time is from the end of one to the end of the next, so it has the reading of its data; each process prints the
median of its steps after ten, the table shows the medians over the rounds and their ratio with its spread. The
aim is a ratio of at most 1.01. Writes docs/figures/peers.svg.

With `--instructions`: CPU instructions of a step, which noise does not touch, counted by valgrind's callgrind over
the last steps of one process without another rank. It needs valgrind with its headers and a C compiler; machines
whose counters can be read have the same from `perf stat`.

The loop written by hand is what one would write without a drumline: DDP, no_sync on all but the last forward,
batches sliced from tensors in memory, clipping, one AdamW step, and the loss of the step read once. It has no
prefetch thread, order, metrics, checkpoints or agreement between ranks.
"""

import argparse
import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bars import Bar, bars

ROOT = Path(__file__).resolve().parents[1]
WORLD = int(os.environ.get("WORLD_SIZE", "2"))
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "length": 16, "rows": 1, "k": 1},
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "length": 128, "rows": 4, "k": 2},
    "larger": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "length": 128, "rows": 4, "k": 2},
}  # fmt: skip
"""`rows` of `length` tokens in each of `k` micro-batches on each rank; from overhead to arithmetic."""
SKIPPED = 10
COUNTED = 20
"""Steps whose instructions are counted, after those that are skipped."""
SHIM = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(void) { CALLGRIND_STOP_INSTRUMENTATION; }
"""


class Clock:
    """Is told the end of every step; seconds from one to the next, and where asked instructions are counted."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        shim = os.environ.get("OVERHEAD_SHIM")
        self._valgrind = ctypes.CDLL(shim) if shim else None

    def done(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())
        if self._valgrind and len(self.ends) == SKIPPED:
            self._valgrind.begin()
        if self._valgrind and len(self.ends) == SKIPPED + COUNTED:
            self._valgrind.end()

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first."""
        return [later - earlier for earlier, later in itertools.pairwise(self.ends)]


def recipe(model: str, steps: int) -> dict[str, Any]:
    """As MODELS states it, of bytes."""
    config = {
        "vocab_size": 257,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        **MODELS[model],
    }
    length, rows, k = (config.pop(key) for key in ("length", "rows", "k"))
    return {
        "recipe": "overhead",
        "schema": 1,
        "model": {"source": "config", "architecture": "llama", "config": config},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": length,
                 "options": {"max_files": 60}},
        "batch": {"per_device": rows, "gpus": WORLD, "accumulation": k},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "duration": {"steps": steps},
    }  # fmt: skip


def make_plan(model: str, steps: int, launcher: str) -> Any:
    """The plan of the benchmark's recipe, its data prepared."""
    from drumline.data.dataset_manifest import read_dataset_manifest
    from drumline.data.prepare import prepare
    from drumline.plan.resolve import resolve
    from drumline.plan.world import World
    from drumline.recipe.load import validate

    loaded = validate({**recipe(model, steps), "launch": {"launcher": launcher}}, "benchmark")
    folder = prepare(loaded.data, None)
    manifest = read_dataset_manifest(folder)
    assert manifest
    return resolve(
        loaded, World(samples=manifest.samples, fingerprint=manifest.fingerprint, cache=str(folder))
    )


def ours(plan: Any, folder: Path, clock: Clock) -> None:
    """Drumline's own loop."""
    import torch

    from drumline.train.loop import train
    from drumline.train.watch import Watch

    class Told(Watch):
        """Tells the clock, too, that a step is done."""

        def finish(self) -> None:
            super().finish()
            clock.done()

    train(plan, folder, torch.device("cpu"), watch=Told())


def _model_and_rows(plan: Any) -> tuple[Any, Any, Any]:
    """The same model, and all rows that the steps take, in memory."""
    import numpy as np
    import torch

    from drumline.train.batches import open_rows
    from drumline.train.models import ModelBuilder

    rows = open_rows(plan, "train")
    everything = rows.collate(np.arange(plan.steps.total * plan.batch.effective))
    ids, targets = (torch.from_numpy(everything[name]) for name in ("input_ids", "targets"))
    return ModelBuilder(plan.recipe, rows.manifest).whole(), ids, targets


def _slices(plan: Any, rank: int) -> Any:
    """For each step, the rows of each of this rank's micro-batches."""
    b, k = plan.batch.per_device, plan.batch.accumulation
    for step in range(plan.steps.total):
        firsts = [step * plan.batch.effective + m * b * WORLD + rank * b for m in range(k)]
        yield [slice(first, first + b) for first in firsts]


def accelerate_loop(plan: Any, folder: Path, clock: Clock) -> None:
    """A plain accelerate loop, as its documentation has it: accumulate(), prepare(), backward()."""
    import torch
    from accelerate import Accelerator
    from torch.nn import functional

    model, ids, targets = _model_and_rows(plan)
    k = plan.batch.accumulation
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    for chosen in _slices(plan, accelerator.process_index):
        total = torch.zeros(())
        for rows in chosen:
            with accelerator.accumulate(model):
                logits = model(input_ids=ids[rows]).logits
                loss = functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / k
        total.item()
        clock.done()


def deepspeed_loop(plan: Any, folder: Path, clock: Clock) -> None:
    """A plain DeepSpeed loop: ZeRO-0, engine(batch), engine.backward(), engine.step()."""
    import deepspeed
    import deepspeed.ops
    import torch
    from torch.nn import functional

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, ids, targets = _model_and_rows(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    config = {"train_micro_batch_size_per_gpu": plan.batch.per_device,
              "gradient_accumulation_steps": plan.batch.accumulation, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for chosen in _slices(plan, engine.global_rank):
        total = torch.zeros(())
        for rows in chosen:
            logits = engine(input_ids=ids[rows]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / plan.batch.accumulation
        total.item()
        clock.done()


def trainer_loop(plan: Any, folder: Path, clock: Clock) -> None:
    """transformers.Trainer over the same rows."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, ids, _ = _model_and_rows(plan)
    rows = [{"input_ids": ids[n], "labels": ids[n]} for n in range(len(ids))]

    class Told(TrainerCallback):  # type: ignore[misc]
        """Tells the clock that an optimizer step is done."""

        def on_step_end(self, *rest: Any, **more: Any) -> None:
            clock.done()

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=plan.steps.total, use_cpu=True, report_to=[], learning_rate=1e-3,
        per_device_train_batch_size=plan.batch.per_device,
        gradient_accumulation_steps=plan.batch.accumulation,
        save_strategy="no", logging_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
        weight_decay=0.0, optim="adamw_torch_fused", ddp_backend="gloo",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Told()]).train()


def by_hand(plan: Any, folder: Path, clock: Clock) -> None:
    """A plain DDP loop over the same model and rows; without DDP where there is one rank."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    built, ids, targets = _model_and_rows(plan)
    model = DistributedDataParallel(built, gradient_as_bucket_view=True) if WORLD > 1 else built
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for chosen in _slices(plan, dist.get_rank()):
        total = torch.zeros(())
        for rows in chosen:
            model.require_backward_grad_sync = rows is chosen[-1]
            logits = model(input_ids=ids[rows]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten())
            loss = loss / len(chosen)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        clock.done()


LOOPS: dict[str, tuple[Any, str]] = {
    "by hand": (by_hand, "torchrun"),
    "drumline torch": (ours, "torchrun"),
    "drumline accelerate": (ours, "accelerate"),
    "drumline deepspeed": (ours, "deepspeed"),
    "plain accelerate": (accelerate_loop, "torchrun"),
    "plain deepspeed": (deepspeed_loop, "torchrun"),
    "transformers.Trainer": (trainer_loop, "torchrun"),
}
"""Each with the launcher of the plan that it is given; the first is what ratios are taken to."""


def rank_main(loop: str, model: str, steps: int, folder: Path) -> None:
    """One rank of one loop; rank 0 prints its median."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (run, launcher), clock = LOOPS[loop], Clock()
    run(make_plan(model, steps, launcher), folder, clock)
    if dist.get_rank() == 0:
        print(statistics.median(clock.seconds[SKIPPED:]))
    dist.barrier()
    dist.destroy_process_group()


def start(loop: str, model: str, steps: int) -> float:
    """Both ranks of one loop; the median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(WORLD):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}  # fmt: skip
            command = [sys.executable, __file__, "--rank-of", loop, "--model", model, "--steps", str(steps),
                       "--folder", folder]  # fmt: skip
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        assert not any(process.returncode for process in processes)
        return float(outputs[0].split()[-1])


def instructions(loop: str, model: str) -> int:
    """Instructions of a step of one loop, alone in its process under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        source, shim, out = (Path(folder) / name for name in ("shim.c", "shim.so", "callgrind.out"))
        source.write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
        env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1", "OVERHEAD_SHIM": str(shim)}  # fmt: skip
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}",
                   sys.executable, __file__, "--rank-of", loop, "--model", model,
                   "--steps", str(SKIPPED + COUNTED + 2), "--folder", folder]  # fmt: skip
        subprocess.run(command, env=env, check=True, capture_output=True)
        totals = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
        return int(totals[0].split()[1]) // COUNTED


def count(models: list[str]) -> None:
    """Print instructions of a step, and their ratio to those of the loop by hand."""
    print(f"{'model':<8} {'loop':<22} {'instructions':>14} {'ratio':>7}")
    for model in models:
        base = 0
        for name in LOOPS:
            found = instructions(name, model)
            base = base or found
            print(f"{model:<8} {name:<22} {found:>14,} {found / base:>7.3f}", flush=True)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=MODELS, help="one model instead of all")
    parser.add_argument("--instructions", action="store_true", help="count them, by valgrind")
    arguments = parser.parse_args()
    if arguments.rank_of:
        return rank_main(arguments.rank_of, arguments.model, arguments.steps, arguments.folder)
    models = [arguments.only] if arguments.only else list(MODELS)
    if arguments.instructions:
        return count(models)
    chart: list[Bar] = []
    print(
        f"{'model':<8} {'loop':<22} {'ms':>7} {'ratio':>7}   ({arguments.rounds} rounds in turns)"
    )
    for model in models:
        make_plan(model, arguments.steps, "torchrun")
        times: dict[str, list[float]] = {name: [] for name in LOOPS}
        for _ in range(arguments.rounds):
            for name in LOOPS:
                times[name].append(start(name, model, arguments.steps))
        base = times["by hand"]
        for name, found in times.items():
            ratios = [mine / theirs for mine, theirs in zip(found, base, strict=True)]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            bar = (statistics.median(ratios), min(ratios), max(ratios), models.index(model))
            chart.append(Bar(f"{name}, {model}", *bar))
            print(f"{model:<8} {name:<22} {1e3 * statistics.median(found):>7.1f}"
                  f" {statistics.median(ratios):>7.3f} {spread}", flush=True)  # fmt: skip
    if not arguments.only:
        title = "Time of a step over that of a loop written by hand, two CPU processes"
        (ROOT / "docs/figures/peers.svg").write_text(bars(title, chart, "×", mark=1.0))


if __name__ == "__main__":
    main()
