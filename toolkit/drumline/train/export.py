"""Exports a checkpoint as a folder that transformers loads: config.json and safetensors."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from drumline.checkpoint.boxes import whole
from drumline.checkpoint.manifest import read_manifest
from drumline.checkpoint.shards import read_entries
from drumline.checkpoint.weights import WEIGHTS
from drumline.data.chats.template import save_template
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.processors import save_processor
from drumline.data.tokenizers import find_tokenizer, save_tokenizer
from drumline.errors import CheckpointError
from drumline.files import apply_umask
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision
from drumline.train.ema import PREFIX
from drumline.train.loader import copy_overlap
from drumline.train.models import ModelBuilder
from drumline.train.models.adapter import export_adapter, merge_adapter
from drumline.train.models.build import base_dtype


def export(
    plan: Plan,
    manifest: DatasetManifest,
    checkpoint: Path,
    target: Path,
    merge: bool = False,
    ema: bool = False,
) -> int:
    """Write the model of a verified checkpoint into `target`; returns the number of parameters written.

    Of a run with an adapter that is the adapter alone, in peft's format, or with `merge` the whole model with
    the adapter added to it in fp32. `ema`: the averages of the trained weights in their place. Holds one copy
    of the whole model in host memory.
    """
    recipe, adapter = plan.recipe, plan.recipe.model.adapter
    is_narrow = find_precision(recipe.precision, recipe.strategy.name).stored == 2
    dtype = torch.bfloat16 if is_narrow and not merge else torch.float32
    model: Any = ModelBuilder(recipe, manifest, dtype=dtype).whole()
    if not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"{plan.recipe.model.factory}: a factory's model is not one of transformers'. Nearest: "
            f"load {checkpoint} yourself; docs/training.md says what lies in it"
        )
    wanted = {
        f"{PREFIX if ema and p.requires_grad else WEIGHTS}{name}": p
        for name, p in model.named_parameters()
        if p.requires_grad or not adapter
    }
    wanted |= {f"buffer.{name}": b for name, b in model.named_buffers()}
    filled = dict.fromkeys(wanted, 0)
    for rank in range(read_manifest(checkpoint)["ranks"]):
        entries = read_entries(checkpoint, rank)
        for stored in {entry["file"] for entry in entries.values()}:
            with safe_open(checkpoint / stored, framework="pt") as file:
                for name in wanted.keys() & set(file.keys()):
                    part = file.get_tensor(name)
                    filled[name] += part.numel()
                    shape, boxes = tuple(entries[name]["shape"]), entries[name]["boxes"]
                    copy_overlap(part, boxes, wanted[name].data, whole(shape))
    weights = {n: p for n, p in wanted.items() if n.startswith((WEIGHTS, PREFIX))}
    short = [n for n, p in weights.items() if filled[n] != p.numel()]
    if short:
        raise CheckpointError(f"{checkpoint}: {short[0]} is not whole in it")
    if adapter and not merge:
        export_adapter(model, adapter, recipe.model.name or recipe.model.path or "", target)
        written = sum(p.numel() for p in wanted.values() if p.requires_grad)
    else:
        if adapter:
            merge_adapter(model)
            model.to(torch.bfloat16 if is_narrow else base_dtype(recipe))
        _restore_config(plan, model)
        model.save_pretrained(target, safe_serialization=True)
        written = sum(p.numel() for p in model.parameters())
    if tokenizer_counts(plan, manifest):
        save_tokenizer(plan.recipe.data.tokenizer, target)
    save_processor(plan.recipe.data, target)
    if plan.recipe.data.chat_template is not None:
        save_template(plan.recipe.data.chat_template, target)
    for path in target.iterdir():
        apply_umask(path, 0o666)
    return written


def tokenizer_counts(plan: Plan, manifest: DatasetManifest) -> bool:
    """Whether the run's rows are tokens, so that a tokenizer belongs to the model."""
    return manifest.tokenizer is not None and plan.recipe.data.task_factory is None


def _restore_config(plan: Plan, model: Any) -> None:
    """Set what the run changed for training back, and the tokens that its texts ended and began with."""
    data, config = plan.recipe.data, model.config
    if "use_cache" not in plan.recipe.model.config and hasattr(config, "use_cache"):
        config.use_cache = True
    if data.facts.head != "causal_lm" or data.task_factory is not None:
        return
    tokenizer = find_tokenizer(data.tokenizer, data.bos)
    settings = [config, *filter(None, [getattr(model, "generation_config", None)])]
    for one in settings:
        one.eos_token_id = tokenizer.end
        if tokenizer.begin is not None or plan.recipe.model.source == "config":
            one.bos_token_id = tokenizer.begin


def check_finite(target: Path) -> list[str]:
    """Names of exported tensors that hold a value that is not finite."""
    bad = []
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            bad += [n for n in file.keys() if not torch.isfinite(file.get_tensor(n)).all()]  # noqa: SIM118
    return bad
