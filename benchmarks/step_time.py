"""How long is a step on this GPU, at what MFU, with which options, and what do others need for the same step?

    python benchmarks/step_time.py [--minutes 22] [--only llama-1b] [--rounds 2] [--steps 20]
    python benchmarks/step_time.py --rehearse      without a GPU: tiny models, to see that it would run

One GPU, one process, no network. For each model every option is switched on alone, then several together.
Beside it, in turns, the same model, rows and precision in a loop written by hand and in transformers.Trainer,
where they have the options. A step's time is the median over the steps after a few, the ratio the median over
the rounds. MFU is of the model's FLOPs, without what checkpointing repeats, and the GPU's dense bf16 peak.
What runs out of memory is said to. Writes `benchmarks/step_time/` (`--out`), named by GPU and torch, and
`docs/figures/mfu.svg`.

The loop written by hand has its rows on the GPU already, no metrics, order or checks, and reads its loss once
per step, as drumline does.
"""

import argparse
import csv
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_truth
import numpy as np
import torch
import torch.distributed as dist
from bars import Bar, bars
from torch.nn import functional

from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan
from drumline.train import loop
from drumline.train.batches import open_rows
from drumline.train.engines.base import autocast_dtype
from drumline.train.models import ModelBuilder

PLAIN = {"attention": "eager", "implementation": "foreach", "precision": "bf16", "k": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused optimizer": {"implementation": "fused"},
    "flash attention": {"attention": "sdpa"},
    "chunked loss": {"chunked": True},
    "selective checkpointing": {"checkpointing": "selective"},
    "compile": {"compile": True},
    "fused, flash": {"implementation": "fused", "attention": "sdpa"},
    "fused, flash, compile": {"implementation": "fused", "attention": "sdpa", "compile": True},
    "all": {"implementation": "fused", "attention": "sdpa", "chunked": True,
            "checkpointing": "selective", "compile": True},
}  # fmt: skip
WITH_PEERS = ("plain", "fused, flash", "fused, flash, compile")
LORA = {"adapter": {"rank": 16, "alpha": 32.0}}
MODELS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "llama-1b", "b": 2, "length": 2048, "k": 2}, tuple(OPTIONS)),
    ({"model": "gpt2-124m", "b": 16, "length": 1024}, tuple(OPTIONS)),
    ({"model": "llama-8b", "b": 1, "length": 4096, "precision": "bf16-pure", "checkpointing": "full"},
     ("fused, flash", "fused, flash, compile")),
    ({"model": "llama-8b", "b": 1, "length": 2048, **LORA},
     ("plain", "fused, flash", "selective checkpointing", "fused, flash, compile", "all")),
    ({"model": "llama-1b", "b": 2, "length": 2048, "k": 2, **LORA}, ("plain", "fused, flash", "all")),
    ({"model": "llama-1b", "b": 8, "length": 4096, "checkpointing": "full"}, ("fused, flash, compile",)),
]  # fmt: skip
"""Each with the options that are tried, the most telling first: the time may not be enough for all."""
REHEARSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "tiny-llama", "b": 2, "length": 64, "k": 2}, tuple(OPTIONS)),
    ({"model": "tiny-gpt2", "b": 2, "length": 64, **LORA}, ("plain", "all")),
]
GOAL = 0.6
"""Of MFU, for 1B and 8B."""


@dataclass(frozen=True)
class Bench:
    """Where and how long it is measured."""

    device: torch.device
    gpu: str
    rounds: int
    steps: int

    @property
    def skipped(self) -> int:
        """Steps before those that count."""
        return max(1, self.steps // 4)

    def median(self, values: list[float]) -> float:
        """Of the steps that count."""
        return statistics.median(values[self.skipped :])


def ours(plan: Plan, bench: Bench) -> tuple[list[float], list[float]]:
    """Seconds and MFU of each step, from drumline's own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        loop.train(plan, Path(folder), bench.device)
        lines = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "seconds" in line]
    return [line["seconds"] for line in lines], [line["mfu"] or 0.0 for line in lines]


def _model_and_rows(plan: Plan, device: torch.device) -> tuple[Any, Any, Any]:
    rows = open_rows(plan, "train")
    everything = rows.collate(np.arange(plan.steps.total * plan.batch.effective))
    ids, targets = (torch.from_numpy(everything[name]) for name in ("input_ids", "targets"))
    return ModelBuilder(plan.recipe, rows.manifest, device).whole(), ids, targets


def by_hand(plan: Plan, bench: Bench) -> list[float]:
    """Seconds of each step of a plain loop over the same rows."""
    device = bench.device
    model, ids, targets = _model_and_rows(plan, device)
    ids, targets = ids.to(device), targets.to(device)
    if plan.recipe.model.compile:
        model.compile()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kernel = {plan.recipe.optimizer.implementation or "fused": True}
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.1, **kernel)  # type: ignore[arg-type]
    k, dtype, seconds = plan.batch.accumulation, autocast_dtype(plan), []
    for _ in range(plan.steps.total):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for number in range(k):
            first = len(seconds) * plan.batch.effective + number * plan.batch.per_device
            chosen = slice(first, first + plan.batch.per_device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(input_ids=ids[chosen]).logits.flatten(0, 1).float()
                loss = functional.cross_entropy(logits, targets[chosen].flatten()) / k
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        seconds.append(time.perf_counter() - started)
    return seconds


def trainer(plan: Plan, bench: Bench) -> list[float]:
    """Seconds of each step of transformers.Trainer over the same rows, from the end of one to that of the next."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    recipe = plan.recipe
    model, ids, _ = _model_and_rows(plan, bench.device)
    rows = [{"input_ids": ids[n], "labels": ids[n]} for n in range(len(ids))]
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when each optimizer step ends on the device."""

        def on_step_end(self, *rest: Any, **more: Any) -> None:
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    kernel = "adamw_torch_fused" if recipe.optimizer.implementation == "fused" else "adamw_torch"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=plan.steps.total, use_cpu=bench.device.type == "cpu", report_to=[],
            learning_rate=1e-5, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="constant",
            per_device_train_batch_size=plan.batch.per_device,
            gradient_accumulation_steps=plan.batch.accumulation, bf16=recipe.precision == "bf16",
            optim=kernel, torch_compile=recipe.model.compile, save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def peers_of(spec: dict[str, Any], option: str) -> dict[str, Any]:
    """The loops beside drumline's that can do the same."""
    if option not in WITH_PEERS or spec.get("checkpointing") or spec.get("adapter"):
        return {}
    return {"by_hand": by_hand, "trainer": trainer}


def measure(spec: dict[str, Any], option: str, bench: Bench) -> dict[str, Any]:
    """One line of the table."""
    spec = {**PLAIN, **spec, **OPTIONS[option]}
    plan = memory_truth.plan_of(spec, bench.gpu, bench.steps)
    times: dict[str, list[float]] = {}
    mfu: list[float] = []
    peak, outcome = 0, "trained"
    try:
        for _ in range(bench.rounds):
            memory_truth.clear(bench.device)
            seconds, found = ours(plan, bench)
            if bench.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
            times.setdefault("drumline", []).append(bench.median(seconds))
            mfu.append(bench.median(found))
            for name, run in peers_of(spec, option).items():
                memory_truth.clear(bench.device)
                torch._dynamo.reset()
                times.setdefault(name, []).append(bench.median(run(plan, bench)))
    except torch.OutOfMemoryError:
        outcome = "out of memory"
    except ImportError as error:  # peft or accelerate, which a machine with a GPU may lack
        outcome = f"needs {error.name or error}"
    torch._dynamo.reset()
    memory_truth.clear(bench.device)
    line: dict[str, Any] = {
        "model": spec["model"], "training": "lora" if spec.get("adapter") else "full", "option": option,
        "per_device": spec["b"], "length": spec["length"], "accumulation": spec["k"],
        "precision": spec["precision"], "checkpointing": spec.get("checkpointing", "none"),
        "attention": spec["attention"], "implementation": spec["implementation"],
        "compile": spec.get("compile", False), "chunked": spec.get("chunked", False), "outcome": outcome,
        "ms": "", "low_ms": "", "high_ms": "", "tokens_per_s": "", "mfu": "", "peak_gib": "",
        "by_hand_ms": "", "ratio": "", "trainer_ms": "", "trainer_ratio": "", "estimated_ms": "",
    }  # fmt: skip
    if plan.time:
        line["estimated_ms"] = round(1e3 * plan.time.step_s.expected, 2)
    if (mine := times.get("drumline")) and mfu:
        middle = statistics.median(mine)
        tokens = plan.batch.effective * spec["length"]
        line |= {"ms": round(1e3 * middle, 2), "low_ms": round(1e3 * min(mine), 2),
                 "high_ms": round(1e3 * max(mine), 2), "tokens_per_s": round(tokens / middle),
                 "mfu": round(statistics.median(mfu), 4), "peak_gib": round(peak / 2**30, 2)}  # fmt: skip
    for name, column in (("by_hand", "ratio"), ("trainer", "trainer_ratio")):
        if theirs := times.get(name):
            line[f"{name}_ms"] = round(1e3 * statistics.median(theirs), 2)
            ratios = [a / b for a, b in zip(times["drumline"], theirs, strict=False)]
            line[column] = round(statistics.median(ratios), 3)
    return line


def lines_of(
    models: list[tuple[dict[str, Any], tuple[str, ...]]], bench: Bench, minutes: float, only: str
) -> Iterator[dict[str, Any]]:
    """The configurations in order, while there is time."""
    deadline = time.monotonic() + 60 * minutes
    for spec, options in models:
        for option in options:
            if only and only != spec["model"]:
                continue
            if time.monotonic() > deadline:
                print("out of time; the rest is left out")
                return
            yield measure(spec, option, bench)


def figure(lines: list[dict[str, Any]], gpu: str) -> str:
    """MFU by option, a colour for each model."""
    names = [f"{line['model']} {line['training']}" for line in lines]
    groups = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = [
        Bar(f"{name}, {line['option']}", 100 * line["mfu"], 100 * line["mfu"], 100 * line["mfu"], groups[name])
        for name, line in zip(names, lines, strict=True)
        if line["ms"]
    ]  # fmt: skip
    return bars(f"MFU by option on {gpu}", found, "%", mark=100 * GOAL)


def run(models: list[Any], bench: Bench, options: argparse.Namespace) -> None:
    """Measure, print, write as it goes."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if bench.device.type == "cuda" else "gloo",
        store=dist.HashStore(), rank=0, world_size=1,
    )  # fmt: skip
    facts = memory_truth.machine()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{bench.gpu}-torch{facts['torch'].split('+')[0]}.csv"
    lines = []
    with path.open("w", newline="") as file:
        file.write("# " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
        writer = None
        for line in lines_of(models, bench, options.minutes, options.only):
            if writer is None:
                writer = csv.DictWriter(file, list(line))
                writer.writeheader()
            writer.writerow(line)
            file.flush()
            lines.append(line)
            print({key: value for key, value in line.items() if value != ""}, flush=True)
    dist.destroy_process_group()
    if any(line["ms"] for line in lines):
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        options.figure.write_text(figure(lines, bench.gpu))


def main() -> None:
    """Measure all on the GPU, or rehearse on a CPU."""
    root = memory_truth.ROOT
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="one model of MODELS")
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--out", type=Path, default=root / "benchmarks/step_time")
    parser.add_argument("--figure", type=Path, default=root / "docs/figures/mfu.svg")
    options = parser.parse_args()
    if options.rehearse:
        bench = Bench(torch.device("cpu"), "cpu", rounds=1, steps=4)
        return run(REHEARSED, bench, options)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; --rehearse needs none")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    memory_truth.leave_out(device)
    bench = Bench(device, memory_truth.known_gpu(), options.rounds, options.steps)
    run(MODELS, bench, options)


if __name__ == "__main__":
    main()
