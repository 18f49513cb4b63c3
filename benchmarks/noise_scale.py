"""What does measuring the gradient noise scale cost per step?

    python benchmarks/noise_scale.py [--rounds 40]

One process, the same engine and step, with the meter and without it, in turns; medians and their ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "toolkit"), str(ROOT / "launchers")]

MODELS: dict[str, dict[str, Any]] = {
    "0.1M": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "5M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
}


def recipe(model: str) -> dict[str, Any]:
    """Four micro-batches of four rows of 128 bytes."""
    config = {
        "vocab_size": 257,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        **MODELS[model],
    }
    return {
        "recipe": "noise",
        "schema": 1,
        "model": {"source": "config", "architecture": "llama", "config": config},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": 128,
                 "options": {"max_files": 60}},
        "batch": {"effective": 16, "per_device": 4, "gpus": 1, "accumulation": 4},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "duration": {"steps": 1000},
        "logging": {"noise_scale": True},
    }  # fmt: skip


def measure(model: str, rounds: int) -> tuple[float, float]:
    """Median seconds of a step without and with the meter."""
    import torch

    from drumline.recipe.load import validate
    from drumline.session.planning import make_plan, prepare_data
    from drumline.train.batches import StepReader, open_rows
    from drumline.train.engines import build_engine
    from drumline.train.loop import forward_backward
    from drumline.train.noise import HookMeter, NoMeter
    from drumline.train.watch import Watch

    loaded = validate(recipe(model), "benchmark")
    prepare_data(loaded)
    plan = make_plan(loaded)
    rows = open_rows(plan, "train")
    engine = build_engine(plan, rows.manifest, torch.device("cpu"))
    reader, watch = StepReader(plan, rows, 0), Watch()
    meters = {"off": NoMeter(), "on": HookMeter(engine)}
    seconds: dict[str, list[float]] = {name: [] for name in meters}
    for number in range(1, rounds + 1):
        step = reader.read(number)
        for name, meter in meters.items():
            began = time.perf_counter()
            forward_backward(engine, step, watch, meter)
            meter.measured()
            engine.clip(1.0)
            engine.step(1e-4)
            seconds[name].append(time.perf_counter() - began)
    off, on = (statistics.median(seconds[name][5:]) for name in ("off", "on"))
    return off, on


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    import torch.distributed as dist

    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        print(f"{'model':>6} {'off ms':>8} {'on ms':>8} {'ratio':>6}")
        for model in MODELS:
            off, on = measure(model, arguments.rounds)
            print(f"{model:>6} {1e3 * off:>8.1f} {1e3 * on:>8.1f} {on / off:>6.3f}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
