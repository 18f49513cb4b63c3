"""How long is a step on this GPU, at what MFU, and what does drumline's loop add to one written by hand?

    python benchmarks/step_time.py [--rounds 2] [--steps 20] [--minutes 10] [--only llama-1b]

One GPU, one process, no network. The same model, rows, precision and fused AdamW; drumline's loop (without its last save) and the
loop written by hand in turns. A step's time is the median over the steps after five; the ratio is the median
over the rounds. MFU is drumline's own figure: the model's FLOPs (without what checkpointing repeats) over the
GPU's dense bf16 peak. Writes `benchmarks/step_time/` (`--out`), named by GPU and torch.

The loop written by hand has its rows on the GPU already, no metrics, order or checks, and reads its loss once
per step, as drumline does.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory_truth
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan
from drumline.train import loop
from drumline.train.batches import open_rows
from drumline.train.engines.base import autocast_dtype
from drumline.train.models import ModelBuilder

SKIPPED = 5
BASE = {"precision": "bf16", "k": 1}
CASES: list[dict[str, Any]] = [
    {**BASE, "model": "gpt2-124m", "b": 16, "length": 1024},
    {**BASE, "model": "gpt2-124m", "b": 4, "length": 1024, "k": 4},
    {**BASE, "model": "llama-1b", "b": 4, "length": 2048},
    {**BASE, "model": "llama-1b", "b": 4, "length": 2048, "compile": True},
    {**BASE, "model": "llama-1b", "b": 8, "length": 4096, "checkpointing": "full", "chunked": True},
]


def ours(plan: Plan, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds and MFU of each step, from drumline's own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        loop.train(plan, Path(folder), device)
        lines = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "seconds" in line]
    return [line["seconds"] for line in lines], [line["mfu"] or 0.0 for line in lines]


def by_hand(plan: Plan, device: torch.device) -> list[float]:
    """Seconds of each step of a plain loop over the same rows."""
    rows = open_rows(plan, "train")
    everything = rows.collate(np.arange(plan.steps.total * plan.batch.effective))
    ids, targets = (
        torch.from_numpy(everything[name]).to(device) for name in ("input_ids", "targets")
    )
    model = ModelBuilder(plan.recipe, rows.manifest, device).whole()
    if plan.recipe.model.compile:
        model.compile()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    k, dtype, seconds = plan.batch.accumulation, autocast_dtype(plan), []
    for _ in range(plan.steps.total):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for number in range(k):
            first = len(seconds) * plan.batch.effective + number * plan.batch.per_device
            chosen = slice(first, first + plan.batch.per_device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(input_ids=ids[chosen]).logits
                loss = (
                    functional.cross_entropy(
                        logits.flatten(0, 1).float(), targets[chosen].flatten()
                    )
                    / k
                )
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(
    spec: dict[str, Any], gpu: str, device: torch.device, rounds: int, steps: int
) -> dict[str, Any]:
    """One line of the table."""
    plan = memory_truth.plan_of(spec, gpu, steps)
    has_twin = not spec.get("chunked")  # a plain loop has no loss in chunks
    mine: list[float] = []
    theirs: list[float] = []
    mfu: list[float] = []
    for _ in range(rounds):
        seconds, found = ours(plan, device)
        mine.append(statistics.median(seconds[SKIPPED:]))
        mfu.append(statistics.median(found[SKIPPED:]))
        memory_truth.clear(device)
        if has_twin:
            theirs.append(statistics.median(by_hand(plan, device)[SKIPPED:]))
            memory_truth.clear(device)
    tokens = plan.batch.effective * spec["length"]
    ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
    return {
        "model": spec["model"], "per_device": spec["b"], "length": spec["length"],
        "accumulation": spec["k"], "precision": spec["precision"],
        "checkpointing": spec.get("checkpointing", "none"), "compile": spec.get("compile", False),
        "chunked": spec.get("chunked", False),
        "ms": round(1e3 * statistics.median(mine), 2),
        "by_hand_ms": round(1e3 * statistics.median(theirs), 2) if theirs else "",
        "ratio": round(statistics.median(ratios), 3) if ratios else "",
        "tokens_per_s": round(tokens / statistics.median(mine)),
        "mfu": round(statistics.median(mfu), 4),
    }  # fmt: skip


def lines_of(
    gpu: str, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The cases in order, while there is time."""
    deadline = time.monotonic() + 60 * options.minutes
    for spec in CASES:
        if options.only and options.only != spec["model"]:
            continue
        if time.monotonic() > deadline:
            print("out of time; the rest is left out")
            return
        yield measure(spec, gpu, device, options.rounds, options.steps)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help="one model of CASES")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=memory_truth.ROOT / "benchmarks/step_time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    device, gpu = torch.device("cuda", 0), memory_truth.known_gpu()
    torch.cuda.set_device(device)
    memory_truth.leave_out(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    facts = memory_truth.machine()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{gpu}-torch{facts['torch'].split('+')[0]}.csv"
    with path.open("w", newline="") as file:
        file.write("# " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
        writer = None
        for line in lines_of(gpu, device, options):
            if writer is None:
                writer = csv.DictWriter(file, list(line))
                writer.writeheader()
            writer.writerow(line)
            file.flush()
            print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
