"""What does torch.compile cost before the first step, and gain in the others, as a whole or block by block?

    python benchmarks/compile.py [--rounds 3] [--layers 4 16] [--device cuda]

A Llama of so many layers in drumline's own loop, one process, each measurement in a process of its own and
in turns, with the compiler's caches off. `blocks` is what `model.compile: true` does; `whole` compiles model
and loss as one graph. Printed: seconds of the first step (the warm-up is in it) and the median of the others.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("no", "whole", "blocks")
STEPS, SKIPPED = 14, 4


def measure(way: str, layers: int, on: str) -> None:
    """One process: print seconds until the end of the first step, and of a step."""
    import torch
    import torch.distributed as dist

    from drumline.data.prepare import prepare
    from drumline.metrics_file import read_metrics
    from drumline.plan.model import Plan
    from drumline.recipe.load import validate
    from drumline.session.planning import make_plan
    from drumline.train import loop

    def whole(module: Any) -> None:
        module.compile()

    engine = importlib.import_module("drumline.train.engines.torch")
    if way == "whole":
        engine.compile_module = whole  # type: ignore[attr-defined]
    recipe = validate({
        "recipe": "compile", "schema": 1,
        "model": {"source": "config", "architecture": "llama", "compile": way != "no", "config": {
            "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "vocab_size": 8192,
            "num_attention_heads": 4, "num_key_value_heads": 4}},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": 128},
        "batch": {"per_device": 4, "gpus": 1, "accumulation": 1},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "duration": {"steps": STEPS},
    }, "benchmark")  # fmt: skip
    prepare(recipe.data, recipe.project)
    plan: Plan = make_plan(recipe)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        begun = time.perf_counter()
        loop.train(plan, Path(folder), torch.device(on))
        taken = time.perf_counter() - begun
        seconds = [
            m["seconds"] for m in read_metrics(Path(folder) / "metrics.jsonl") if "seconds" in m
        ]
    print(taken - sum(seconds[1:]), statistics.median(seconds[SKIPPED:]))


def start(way: str, layers: int, on: str) -> tuple[float, float]:
    """The two figures of a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--layers", str(layers), "--device", on]
    env = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    first, step = done.stdout.split()[-2:]
    return float(first), float(step)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return measure(arguments.one, arguments.layers[0], arguments.device)
    print(f"{'layers':>6} {'compiled':<9} {'first step, s':>14} {'a step, ms':>11} {'ratio':>6}")
    for layers in arguments.layers:
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, values in found.items():
                values.append(start(way, layers, arguments.device))
        for way, values in found.items():
            first, step = (statistics.median(part) for part in zip(*values, strict=True))
            ratio = statistics.median(
                mine[1] / theirs[1] for mine, theirs in zip(values, found["no"], strict=True)
            )
            print(
                f"{layers:>6} {way:<9} {first:>14.1f} {1e3 * step:>11.1f} {ratio:>6.2f}", flush=True
            )


if __name__ == "__main__":
    main()
