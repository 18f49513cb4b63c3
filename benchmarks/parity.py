"""Is it one curve? The same recipe under every launcher, strategy and split; two tables.

    python benchmarks/parity.py [--steps 50]

Rows of very unequal token counts (sft), a short last step in every epoch. fp32: the largest
relative difference of any step's loss and gradient norm to one process; digests and learning rates
must be equal. bf16: the same against fp32 on one process, which is what the type itself costs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINES = {
    "torch ddp": [],
    "torch fsdp": ["strategy.name=fsdp"],
    "accelerate ddp": ["launch.launcher=accelerate"],
    "accelerate fsdp": ["launch.launcher=accelerate", "strategy.name=fsdp"],
    "deepspeed zero0": ["launch.launcher=deepspeed"],
    "deepspeed zero1": ["launch.launcher=deepspeed", "strategy.name=zero1"],
    "deepspeed zero2": ["launch.launcher=deepspeed", "strategy.name=zero2"],
    "deepspeed zero3": ["launch.launcher=deepspeed", "strategy.name=zero3"],
}
SPLITS = [(12, 1, 1), (3, 2, 2), (2, 2, 3)]
RECIPE = """
recipe: parity
schema: 1
seed: 5
model:
  source: config
  architecture: gpt2
  config: {{vocab_size: 257, n_positions: 64, n_embd: 64, n_layer: 2, n_head: 2,
           attn_pdrop: 0.0, resid_pdrop: 0.0, embd_pdrop: 0.0}}
data: {{source: files, path: pairs.jsonl, task: sft, sequence_length: 48}}
batch: {{effective: 12, per_device: 12, gpus: 1, accumulation: 1}}
optimizer: {{name: adamw, lr: 3.0e-3, weight_decay: 0.1}}
schedule: {{name: cosine, warmup_steps: 4}}
duration: {{steps: {steps}}}
logging: {{every_steps: 1}}
"""


def run(folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The steps of one run, through the real command."""
    command = [
        sys.executable,
        "-m",
        "drumline.cli",
        "run",
        "parity.yaml",
        *overrides,
        "--run-dir",
        name,
    ]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": f"{os.getcwd()}/toolkit:{os.getcwd()}/launchers"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "lr" in line]


def largest(ours: list[dict[str, Any]], reference: list[dict[str, Any]], key: str) -> float:
    """The largest relative difference of any step."""
    return max(abs(a[key] - b[key]) / b[key] for a, b in zip(ours, reference, strict=True))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "parity.yaml").write_text(RECIPE.format(steps=steps))
        pairs = [(f"prompt {n} " * (n % 3), "word " * (1 + n * n % 9)) for n in range(41)]
        text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)
        (folder / "pairs.jsonl").write_text(text)
        reference: list[dict[str, Any]] = []
        for precision in ("fp32", "bf16"):
            print(
                f"{precision}, {steps} steps{'':<8} {'b×G×k':>8} {'loss':>9} {'norm':>9}  order and rates"
            )
            for engine, overrides in ENGINES.items():
                for b, gpus, k in SPLITS:
                    split = f"batch={{per_device: {b}, gpus: {gpus}, accumulation: {k}}}"
                    lines = run(folder, f"{precision}-{engine}-{b}x{gpus}x{k}".replace(" ", "-"), split,
                                f"precision={precision}", *overrides)  # fmt: skip
                    reference = reference or lines
                    same = all(
                        (a["digest"], a["lr"]) == (z["digest"], z["lr"])
                        for a, z in zip(lines, reference, strict=True)
                    )
                    loss, norm = (largest(lines, reference, key) for key in ("loss", "grad_norm"))
                    verdict = "equal" if same else "NOT EQUAL"
                    print(f"{engine:<22} {f'{b}×{gpus}×{k}':>8} {loss:>9.1e} {norm:>9.1e}  {verdict}",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
