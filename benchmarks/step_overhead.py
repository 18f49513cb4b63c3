"""What does drumline's loop cost per step, against a hand-written DDP loop?

    python benchmarks/step_overhead.py [--rounds 5] [--steps 60]

The same model, data, optimizer and two gloo processes; each loop in processes of its own, in
turns. Each prints the median time of its steps after ten; the table shows the medians over the
rounds and their ratio. The aim is a ratio of at most 1.03.

The hand-written loop is what one would write without a toolkit: DDP, no_sync on all but the last
forward, batches sliced from tensors in memory, clipping, one AdamW step, and the loss of the step
read once. It has no prefetch thread, order, metrics, checkpoints or agreement between ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORLD = 2
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "larger": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
}
SKIPPED = 10


def recipe(model: str, steps: int) -> dict[str, Any]:
    """Two micro-batches of four rows of 128 bytes on each of two ranks."""
    config = {
        "vocab_size": 257,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        **MODELS[model],
    }
    return {
        "recipe": "overhead",
        "schema": 1,
        "model": {"source": "config", "architecture": "llama", "config": config},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": 128,
                 "options": {"max_files": 60}},
        "batch": {"effective": 16, "per_device": 4, "gpus": WORLD, "accumulation": 2},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "duration": {"steps": steps},
    }  # fmt: skip


def make_plan(model: str, steps: int) -> Any:
    """The plan of the benchmark's recipe, its data prepared."""
    from toolkit.data.card import read_card
    from toolkit.data.prepare import prepare
    from toolkit.plan.resolve import World, resolve
    from toolkit.recipe.load import validate

    loaded = validate(recipe(model, steps), "benchmark")
    folder = prepare(loaded.data, None)
    card = read_card(folder)
    assert card
    return resolve(
        loaded, World(samples=card.samples, fingerprint=card.fingerprint, cache=str(folder))
    )


def ours(plan: Any, folder: Path) -> list[float]:
    """Seconds of each step, as drumline's own metrics tell them."""
    import torch

    from toolkit.train.loop import train

    train(plan, folder, torch.device("cpu"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines]


def by_hand(plan: Any, folder: Path) -> list[float]:
    """Seconds of each step of a plain DDP loop over the same model and rows."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    from toolkit.data.rows import Rows
    from toolkit.train.models import Skeleton

    rows = Rows(Path(plan.data.cache), "train")
    skeleton = Skeleton(plan.recipe, rows.card)
    for _ in skeleton.blocks():
        pass
    model = DistributedDataParallel(skeleton.finish(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    per_step, rank = plan.batch.effective, dist.get_rank()
    import numpy as np

    everything = rows.collate(np.arange(plan.steps.total * per_step))
    ids, targets = (
        torch.from_numpy(everything["input_ids"]),
        torch.from_numpy(everything["targets"]),
    )
    b, k = plan.batch.per_device, plan.batch.accumulation
    seconds = []
    for step in range(plan.steps.total):
        started = time.perf_counter()
        total = torch.zeros(())
        for micro in range(k):
            first = step * per_step + micro * b * WORLD + rank * b
            chosen = slice(first, first + b)
            last = micro == k - 1
            model.require_backward_grad_sync = last
            logits = model(input_ids=ids[chosen]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten()) / k
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        seconds.append(time.perf_counter() - started)
    return seconds


LOOPS = {"drumline": ours, "by hand": by_hand}


def rank_main(loop: str, model: str, steps: int, folder: Path) -> None:
    """One rank of one loop; rank 0 prints its median."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (folder / "checkpoints").mkdir(exist_ok=True)
    seconds = LOOPS[loop](make_plan(model, steps), folder)
    if dist.get_rank() == 0:
        print(statistics.median(seconds[SKIPPED:]))
    dist.barrier()
    dist.destroy_process_group()


def start(loop: str, model: str, steps: int) -> float:
    """Both ranks of one loop; the median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(WORLD):
            env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}  # fmt: skip
            command = [sys.executable, __file__, "--rank-of", loop, "--model", model, "--steps", str(steps),
                       "--folder", folder]  # fmt: skip
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        assert not any(process.returncode for process in processes)
        return float(outputs[0].split()[-1])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=MODELS, help="one model instead of all")
    arguments = parser.parse_args()
    if arguments.rank_of:
        return rank_main(arguments.rank_of, arguments.model, arguments.steps, arguments.folder)
    print(
        f"{'model':<8} {'drumline ms':>12} {'by hand ms':>11} {'ratio':>7}   "
        f"({arguments.rounds} rounds in turns)"
    )
    for model in [arguments.only] if arguments.only else MODELS:
        make_plan(model, arguments.steps)
        times: dict[str, list[float]] = {name: [] for name in LOOPS}
        for _ in range(arguments.rounds):
            for name in LOOPS:
                times[name].append(start(name, model, arguments.steps))
        a, b = (1000 * statistics.median(times[name]) for name in ("drumline", "by hand"))
        pairs = zip(times["drumline"], times["by hand"], strict=True)
        ratios = sorted(mine / theirs for mine, theirs in pairs)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"{model:<8} {a:>12.2f} {b:>11.2f} {statistics.median(ratios):>7.3f}   ({spread})")
    return None


if __name__ == "__main__":
    main()
