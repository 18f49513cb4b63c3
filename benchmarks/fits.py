"""Of configurations whose outcome is known, how many does the closed form judge rightly?

    python benchmarks/fits.py [--all]

Three groups of jobs, planned as recipes of ours:

- `fms`: full fine-tuning of Mistral-7B and Llama-3.2 3B that others measured on A100-80GB
  (tests/memory/data/published_peaks.csv): they ran;
- `fms, smaller card`: the same on a card whose memory is 3 % less than the allocated bytes that were measured,
  so that they cannot run;
- `llm-foundry`: MPT of 125M to 70B on A100 and H100 (tests/memory/data/llm_foundry_runs.csv): they ran. MPT is
  stated as GPT-2 with exact GELU and a chunked loss, since llm-foundry's fused loss never holds fp32 logits.
  Rows in fp8 and with another sharding strategy are left out.

Prints a table of verdicts, and the share of false alarms (ran, called does_not_fit) and false fits (cannot run,
called fits or tight). `--all` prints every job. Needs no GPU.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from drumline.architectures.known_models import known_config
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate
from drumline.units import GIB
from memory.test_published import EXPRESSIBLE

DATA = ROOT / "tests/memory/data"
MISTRAL, LLAMA_3B = "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.2-3B"
MPT = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16),
       "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56),
       "70b": (8192, 80, 64)}  # fmt: skip
"""Width, layers and heads of llm-foundry's models; the numbers of parameters in its table go with them."""
CARDS = {"a100_40gb": "a100-40gb", "a100_80gb": "a100-80gb", "h100_80gb": "h100-80gb"}


@dataclass(frozen=True)
class Job:
    """A job in words, its recipe, and whether it ran."""

    group: str
    words: str
    recipe: dict[str, Any]
    ran: bool


def recipe_of(architecture: str, config: dict[str, Any], length: int, b: int, gpus: int, k: int, gpu: Any,
              **sections: Any) -> dict[str, Any]:  # fmt: skip
    """A plain recipe of full training on packed rows."""
    model = {
        "source": "config",
        "architecture": architecture,
        "config": config,
        **sections.pop("model", {}),
    }
    return {
        "recipe": "job",
        "schema": 1,
        "model": model,
        "data": {"source": "files", "path": "/x.txt", "task": "causal_lm", "sequence_length": length,
                 "samples": 10**6},
        "batch": {"per_device": b, "gpus": gpus, "accumulation": k},
        "cluster": {"gpu": gpu, "gpus_per_node": min(8, gpus)},
        "optimizer": {"name": "adamw", "lr": 1e-4, "implementation": "foreach"},
        "duration": {"steps": 10},
        **sections,
    }  # fmt: skip


def measured_by_others() -> Iterator[Job]:
    """Rows of published peaks, on the card that they ran on and on one that is too small."""
    for row in EXPRESSIBLE:
        gpus, b, length = int(row["gpus"]), int(row["micro_batch"]), min(4096, int(row["seq"]))
        is_mistral = row["model"] != "Llama-3.2-3B"
        mixed = gpus > 1 and "mixed" in row["precision"]
        sections: dict[str, Any] = {
            "precision": "bf16" if mixed else "bf16-pure",
            "strategy": {"name": "fsdp" if gpus > 1 else "ddp"},
            "model": {"activation_checkpointing": "full" if is_mistral else "none"},
            "loss": {"chunked": "fast-kernels" in row["notes"]},
        }
        config = dict(known_config(MISTRAL if is_mistral else LLAMA_3B) or {})
        architecture = config.pop("model_type")
        small = {
            "name": "too-small",
            "memory_gib": 0.97 * float(row["value_bytes"]) / GIB,
            "bf16_tflops": 312.0,
        }
        for group, gpu, ran in (("fms", "a100-80gb", True), ("fms, smaller card", small, False)):
            recipe = recipe_of(architecture, config, length, b, gpus, 1, gpu, **sections)
            yield Job(group, f"{row['id']} {architecture} {gpus} × {b} × {length}", recipe, ran)


def run_by_llm_foundry() -> Iterator[Job]:
    """Rows of llm-foundry's table of throughputs."""
    for row in csv.DictReader((DATA / "llm_foundry_runs.csv").open()):
        if "fp8" in row["Precision"] or row["Sharding Strategy"] != "FULL_SHARD":
            continue
        h, layers, heads = MPT[row["Model"]]
        length, gpus = int(row["SeqLen (T)"]), int(row["# GPUs"])
        config = {"n_embd": h, "n_layer": layers, "n_head": heads, "vocab_size": 50368, "n_positions": length,
                  "activation_function": "gelu", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
        full = "full" if row["Activation Checkpointing"] == "True" else "none"
        recipe = recipe_of(
            "gpt2", config, length, int(row["MicroBatchSize"]), gpus, int(row["GradAccum"]), CARDS[row["GPU"]],
            precision="bf16", strategy={"name": "fsdp"}, model={"activation_checkpointing": full},
            loss={"chunked": True},
        )  # fmt: skip
        words = (
            f"MPT-{row['Model']} {row['GPU']} {gpus} × {row['MicroBatchSize']} × {length} {full}"
        )
        yield Job("llm-foundry", words, recipe, ran=True)


def jobs() -> list[Job]:
    """All of them."""
    return [*measured_by_others(), *run_by_llm_foundry()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    alarms = fits = ran = cannot = 0
    for job in jobs():
        memory = resolve(validate(job.recipe, job.words)).memory
        counts.setdefault(job.group, Counter())[memory.verdict] += 1
        ran, cannot = ran + job.ran, cannot + (not job.ran)
        alarms += job.ran and memory.verdict == "does_not_fit"
        fits += not job.ran and memory.verdict in ("fits", "tight")
        if arguments.all:
            assert memory.device and memory.capacity
            print(f"{job.group:<18} {job.words:<44} {memory.device.expected / GIB:6.1f} to {memory.device.high / GIB:6.1f} "
                  f"of {memory.capacity / GIB:6.1f} GiB  {memory.verdict}")  # fmt: skip
    print("jobs                 fits  tight  does not fit")
    for group, found in counts.items():
        print(f"{group:<18} {found['fits']:>6} {found['tight']:>6} {found['does_not_fit']:>13}")
    print(f"false alarms {alarms} of {ran} that ran, false fits {fits} of {cannot} that cannot run")


if __name__ == "__main__":
    main()
