"""Every recipe field matters to the Plan, and every Plan field is read by someone."""

import dataclasses
import re
from typing import Any

from pydantic import BaseModel

from conftest import ROOT, tiny_recipe
from drumline.plan import model
from drumline.plan.resolve import resolve
from drumline.recipe.load import merge, validate
from drumline.recipe.schema import Recipe

WHOLE = {
    "evaluation": {"every_steps": 5, "per_device": 4},
    "early_stopping": {"metric": "eval/loss"},
    "batch": {"effective": 12, "per_device": 3, "gpus": 2, "accumulation": 2},
    "checkpoint": {"every_steps": 10},
    "cluster": {"gpu": "h200", "gpus_per_node": 2},
}
TEXT = {
    "model": {"source": "config", "factory": None, "architecture": "llama", "config": {}},
    "data": {"source": "files", "name": None, "path": "/x.txt", "task": "causal_lm",
             "sequence_length": 64, "samples": 100},
}  # fmt: skip
HUB = {"data": {"source": "hub", "name": "a/b"}}
CHANGES: dict[str, Any] = {
    "recipe": "other",
    "description": "other",
    "project": "/elsewhere",
    "seed": 6,
    "model": [{"source": "hub", "factory": None, "name": "a/b"}, {"factory": "other:mlp"},
              {"config": {"features": 8}}, {"attention": "eager"}, {"compile": True},
              {"activation_checkpointing": "full"}, {"sync_batchnorm": True},
              {"source": "folder", "factory": None, "path": "/m"},
              {"source": "config", "factory": None, "architecture": "gpt2"}, {"edits": ["m:f"]}],
    "data": [{"name": "python-stdlib"}, {"options": {"rows": 5}}, {"label_field": "y"}, {"samples": 9999},
             {"validation": 0.3}, {"tokenizer": "gpt2"}, {"text_field": "t"}, {"prompt_field": "p"},
             {"completion_field": "c"}, {"split": "test"}, {"sequence_length": 9},
             {"source": "files", "name": None, "path": "/x.csv"}, {"task": "sft", "sequence_length": 9},
             {"source": "factory", "name": None, "factory": "m:f"},
             {"task": "custom", "task_factory": "m:f"},
             {"task": "custom", "task_factory": "m:f", "task_options": {"a": 1}}],
    "batch": [{"effective": 24, "accumulation": 4}, {"per_device": 6, "accumulation": 1},
              {"gpus": 4, "accumulation": 1}, {"remainder": "carry"}, {"weighting": "token"},
              {"accumulation": 1, "effective": 6}],
    "cluster": [{"gpu": "b200"}, {"gpus_per_node": 1, "nodes": 2}, {"nodes": {"min": 1, "max": 1}}],
    "strategy": [{"name": "fsdp"}, {"name": "fsdp", "shard": "node"}, {"offload": "optimizer"}],
    "precision": "bf16",
    "optimizer": [{"name": "adam"}, {"lr": 2e-3}, {"weight_decay": 0.1}, {"betas": [0.8, 0.9]}, {"eps": 1e-6},
                  {"name": "sgd", "momentum": 0.5}, {"name": "sgd", "momentum": 0.5, "nesterov": True},
                  {"max_grad_norm": None}, {"implementation": "foreach"},
                  {"name": "custom", "factory": "m:f"}, {"name": "custom", "factory": "m:f", "states": 1},
                  {"name": "custom", "factory": "m:f", "options": {"a": 1}},
                  {"lr_scaling": {"rule": "sqrt", "reference_batch": 3}},
                  {"lr_scaling": {"rule": "sqrt", "reference_batch": 6}}],
    "objective": [{"name": "custom", "factory": "m:f"},
                  {"name": "custom", "factory": "m:f", "options": {"a": 1}}],
    "loss": [{"chunked": True}],
    "schedule": [{"name": "cosine"}, {"warmup_steps": 3}, {"warmup_ratio": 0.5}, {"min_lr_ratio": 0.5},
                 {"unit": "epoch"}, {"name": "cosine_restarts", "cycles": 2},
                 {"name": "polynomial", "power": 2.0}, {"name": "wsd", "decay_ratio": 0.5},
                 {"name": "one_cycle", "start_ratio": 0.1}, {"name": "piecewise", "milestones": {"0.5": 0.1}}],
    "duration": [{"steps": 21}, {"steps": None, "epochs": 2}, {"steps": None, "tokens": 5000}],
    "evaluation": [{"every_steps": 6}, {"per_device": 5}],
    "early_stopping": [{"metric": "eval/accuracy"}, {"mode": "max"}, {"patience": 6}, {"min_delta": 0.5}],
    "checkpoint": [{"every_steps": 11}, {"every_minutes": 5.0}, {"keep_last": 3}, {"keep_best": 0},
                   {"keep_every": 4}, {"async": False}, {"on_error": "continue"}],
    "anomalies": [{"max_skipped": 5}, {"spike_sigma": 4.0}, {"spike_window": 50}, {"skip_spikes": True}],
    "launch": [{"launcher": "accelerate"}, {"max_restarts": 1}, {"hang_timeout_s": 5.0}, {"hang_factor": 5.0}, {"straggler_ratio": None}],
    "logging": [{"every_steps": 3}, {"wandb": {"project": "p"}}, {"wandb": {"project": "p", "mode": "online"}},
                {"wandb": {"project": "p", "entity": "e"}}, {"tensorboard": True}, {"noise_scale": True}],
}  # fmt: skip
NEEDS_TEXT = {"loss.chunked", "duration.tokens"}
EXCEPTIONS = {"schema": "one legal value"}


def test_every_field_matters() -> None:
    """Change any recipe field to another legal value and the Plan changes."""
    base = tiny_recipe(**WHOLE)
    covered = set(EXCEPTIONS)
    for section, changes in CHANGES.items():
        for change in changes if isinstance(changes, list) else [changes]:
            keys = [f"{section}.{key}" for key in change] if isinstance(change, dict) else [section]
            start = base
            if NEEDS_TEXT & set(keys):
                plain = {**base, "early_stopping": None, "evaluation": None}
                start = merge(merge(plain, TEXT), {"data": {"validation": 0.0}})
            if "strategy.offload" in keys:
                start = merge(
                    base, {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero1"}}
                )
            changed = merge(start, {section: change})
            if isinstance(change, dict) and "task" in change:
                changed["early_stopping"] = None
            before, after = (resolve(validate(r, "r")) for r in (start, changed))
            assert before != after, f"{section}: {change}"
            covered |= set(keys)
            if isinstance(change, dict) and "lr_scaling" in change:
                covered |= {"optimizer.lr_scaling.rule", "optimizer.lr_scaling.reference_batch"}
            if isinstance(change, dict) and change.get("wandb"):
                covered |= {"logging.wandb.project", "logging.wandb.mode", "logging.wandb.entity"}
            if isinstance(change, dict) and isinstance(change.get("nodes"), dict):
                covered |= {"cluster.nodes.min", "cluster.nodes.max"}
    assert not set(_fields(Recipe)) - covered


def _fields(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaves of the recipe."""
    names = []
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        inner = [
            a
            for a in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if _is_model(a)
        ]
        if inner:
            names += _fields(inner[0], key + ".")
        else:
            names.append(key)
    return names


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


READ_BY_PEOPLE = {
    "checkpoint_bytes",
    "basis",
    "phases",
    "unit",
    "method",
    "low",
    "plan_version",
    "per_epoch",
    "epochs",
    "last_batch",
}
"""Shown by `drumline plan`, checked when a plan is read back, or kept for scripts that parse --json."""


def test_every_plan_field_is_read() -> None:
    """A field that no code outside plan/ reads is not part of the contract."""
    sources = [
        path.read_text()
        for folder in (
            "toolkit/drumline/train",
            "toolkit/drumline/runs",
            "toolkit/drumline/cli",
            "toolkit/drumline/plan",
            "toolkit/drumline/session",
            "toolkit/drumline/supervise",
            "toolkit/drumline/trace",
            "launchers/drumline_launchers",
        )
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "model.py"
    ]
    text = "\n".join(sources)
    for cls in vars(model).values():
        if dataclasses.is_dataclass(cls) and cls.__module__ == model.__name__:
            for field in dataclasses.fields(cls):
                read = re.search(rf"\.{field.name}\b", text)
                assert read or field.name in READ_BY_PEOPLE, f"{cls.__name__}.{field.name}"
