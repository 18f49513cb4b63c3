"""A tiny GPT-2 on pairs of very unequal length: what every loss that averages averages trips over."""

import json
from pathlib import Path
from typing import Any

from conftest import tiny_recipe
from drumline.plan.model import Plan
from drumline.recipe.load import merge, validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data

MODEL = {
    "source": "config", "factory": None, "architecture": "gpt2",
    "config": {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2,
               "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}  # fmt: skip


def write_pairs(folder: Path) -> Path:
    """41 pairs: three whole steps of 12 an epoch, and one of 5."""
    path = folder / "pairs.jsonl"
    pairs = [(f"prompt {n} " * (n % 3), "word " * (1 + n * n % 9)) for n in range(41)]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def unequal_plan(pairs: Path, split: tuple[int, int, int], **changes: Any) -> Plan:
    """Twelve samples a step, prepared and resolved; sections are merged in."""
    b, gpus, k = split
    base = tiny_recipe(
        model=MODEL,
        data={"source": "files", "name": None, "path": str(pairs), "task": "sft",
              "sequence_length": 48, "samples": None, "validation": 0.0},
        batch={"effective": 12, "per_device": b, "gpus": gpus, "accumulation": k, "weighting": "token"},
        optimizer={"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
        schedule={"name": "cosine", "warmup_steps": 4},
        checkpoint={"keep_last": 3},
    )  # fmt: skip
    if "source" in changes.get("model", {}):
        base["model"] = {}
    recipe = validate(merge(base, changes), "r")
    prepare_data(recipe)
    return make_plan(recipe)
