"""How long until the first step of `drumline run`, and of a bare torch script that builds the same model?

    python benchmarks/first_step.py [--rounds 5] [--layers 12]

Two gloo processes on this machine, in turns. Ours: the command, from its start to the end of the first optimizer
step, with the phases that its record tells (`drumline doctor RUN` shows them); the data are prepared. Bare: torchrun
with a script that imports torch and transformers, builds the model with DDP and AdamW, maps the same prepared
tokens, and does one step; it checks, plans, records and watches nothing. Medians; the aim is a ratio of 1.3.
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

import yaml

from drumline.data.prepare import prepare
from drumline.recipe.load import validate

BARE = """
import os, sys
import numpy as np, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(LlamaForCausalLM(LlamaConfig(**CONFIG, use_cache=False)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
tokens = np.memmap(sys.argv[1], dtype="<u2", mode="r")
rows = np.arange(4)[:, None] * 128 + np.arange(129) + 512 * dist.get_rank()
ids = torch.from_numpy(tokens[rows].astype(np.int64))
logits = model(input_ids=ids[:, :-1]).logits
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("done", loss.item(), flush=True)
dist.destroy_process_group()
"""


def recipe_of(layers: int) -> dict[str, Any]:
    """The recipe of one step."""
    config = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers,
              "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    return {
        "recipe": "first-step", "schema": 1,
        "model": {"source": "config", "architecture": "llama", "config": config},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": 128},
        "batch": {"per_device": 4, "gpus": 2, "accumulation": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 2},
    }  # fmt: skip


def ours(recipe: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase until the end of the first step."""
    command = [sys.executable, "-m", "drumline.cli", "run", str(recipe), "--run-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((folder / "record.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = next(line["seconds"] for line in lines if line.get("step") == 1 and "seconds" in line)
    return {**record["attempts"][0]["start_s"], "first step": step}


def bare(script: Path, tokens: Path) -> float:
    """Seconds from the command's start until rank 0 says that its step is done."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(script),
        str(tokens),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("done"):
            break
    seconds = time.perf_counter() - began
    assert process.wait() == 0
    return seconds  # fmt: skip


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    plain = recipe_of(arguments.layers)
    recipe = validate(plain, "benchmark")
    tokens = prepare(recipe.data, recipe.project) / "train/tokens.bin"
    with tempfile.TemporaryDirectory() as name:
        file, script = Path(name) / "first-step.yaml", Path(name) / "bare.py"
        file.write_text(yaml.safe_dump(plain))
        script.write_text(BARE.replace("CONFIG", repr(plain["model"]["config"])))
        mine: list[dict[str, float]] = []
        theirs: list[float] = []
        for number in range(arguments.rounds + 1):
            mine.append(ours(file, Path(name) / f"run-{number}"))
            theirs.append(bare(script, tokens))
    mine, theirs = mine[1:], theirs[1:]  # the first has bytecode to write
    totals = [sum(one.values()) for one in mine]
    ratios = [a / b for a, b in zip(totals, theirs, strict=True)]
    print(f"drumline {statistics.median(totals):.2f} s, bare {statistics.median(theirs):.2f} s, "
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    for phase in mine[0]:
        print(f"  {phase:<14} {statistics.median(one[phase] for one in mine):>6.2f} s")


if __name__ == "__main__":
    main()
