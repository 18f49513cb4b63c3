"""Every recipe field matters to the Plan, and every Plan field is read by someone."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from conftest import tiny_recipe
from drumline.plan import model
from drumline.plan.resolve import resolve
from drumline.plan.start import Parent
from drumline.plan.steps import Place
from drumline.plan.world import World
from drumline.recipe.load import load_recipe, merge, validate
from drumline.recipe.schedule_section import Duration
from drumline.recipe.schema import Recipe, StartFrom
from drumline_launchers import LAUNCHERS
from drumline_launchers.base import Job

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
IMAGE: dict[str, Any] = {
    "size": 64, "channels": 1, "crop": "none", "resize": 40, "scale": [0.5, 1.0], "ratio": [0.9, 1.1], "flip": 0.0, "jitter": 0.1,
    "rand_augment": {"operations": 3, "magnitude": 5}, "erase": 0.1, "interpolation": "bicubic", "mean": [0.5], "std": [0.5],
    "processor": "/p", "transform": "m:f",
}  # fmt: skip
AUDIO: dict[str, Any] = {
    "features": "waveform",
    "sampling_rate": 8000,
    "seconds": 9,
    "mels": 128,
    "processor": "/p",
}
AFTER: list[dict[str, Any]] = [
    {"every_steps": 3}, {"every_epochs": 1}, {"every_steps": 3, "name": "n"}, {"every_steps": 3, "timeout_minutes": 1.0},
]  # fmt: skip
HUB = {"data": {"source": "hub", "name": "a/b"}}
CHANGES: dict[str, Any] = {
    "recipe": "other",
    "description": "other",
    "project": "/elsewhere",
    "seed": 6,
    "model": [{"source": "hub", "factory": None, "name": "a/b"},
              {"source": "hub", "factory": None, "name": "a/b", "revision": "v2"}, {"factory": "other:mlp"},
              {"config": {"features": 8}}, {"attention": "eager"}, {"compile": True},
              {"activation_checkpointing": "full"},
              {"activation_checkpointing": "selective", "activation_offload": True}, {"sync_batchnorm": True},
              {"source": "folder", "factory": None, "path": "/m"},
              {"source": "config", "factory": None, "architecture": "bert", "config": None}, {"edits": ["m:f"]},
              {"frozen": ["a.*"]}, {"adapter": {"rank": 4}}, {"adapter": {"alpha": 8.0}},
              {"adapter": {"dropout": 0.1}}, {"adapter": {"targets": ["q_proj"]}}, {"adapter": {"dora": True}},
              {"adapter": {"rank": 8}, "quantization": "nf4"}, {"adapter": {"rslora": True}}, {"adapter": {"train_also": ["a"]}}, {"neftune_alpha": 5.0}, {"adapter": {"type": "lora"}}],
    "data": [{"name": "python-stdlib"}, {"options": {"rows": 5}}, {"label_field": "y"}, {"samples": 9999},
             {"validation": 0.3}, {"tokenizer": "gpt2"}, {"text_field": "t"}, {"prompt_field": "p"},
             {"completion_field": "c"}, {"split": "test"}, {"sequence_length": 9},
             {"source": "files", "name": None, "path": "/x.csv"}, {"task": "sft", "sequence_length": 9},
             {"task": "sft", "sequence_length": 9, "messages_field": "m"},
             {"task": "sft", "sequence_length": 9, "train_on": "all"},
             {"task": "sft", "sequence_length": 9, "chat_template": "chatml"},
             {"task": "sft", "sequence_length": 9, "chat_template_options": {"a": 1}},
             {"task": "sft", "sequence_length": 9, "packing": "none"},
             {"task": "sft", "sequence_length": 9, "bos": True}, {"on_bad_row": "skip"},
             {"tokenizer": "gpt2", "special_tokens_in_text": True},
             {"task": "regression"}, {"task": "multi_label"}, {"text_pair_field": "t"},
             {"task": "preference", "sequence_length": 9, "chosen_field": "c"}, {"task": "preference", "sequence_length": 9, "rejected_field": "r"},
             {"task": "token_classification", "sequence_length": 9, "label_names": ["O", "B-X"]},
             {"task": "seq2seq", "sequence_length": 9, "target_length": 5}, {"task": "masked_lm", "sequence_length": 9, "mask_probability": 0.3},
             {"workers": 3}, *({"task": "seq2seq", "target_length": 9, "audio_field": "a", "audio": {"seconds": 5, key: value}} for key, value in AUDIO.items()),
 *({"task": "classification", "image_field": "i", "image": {"size": 32, key: value}} for key, value in IMAGE.items()),
             {"task": "sft", "sequence_length": 9, "image_field": "i", "image": {"processor": "/p"}},
             {"source": "hub", "name": "a/b", "config": "c"},
             {"validation_split": "periodic"}, {"validation_seed": 1},
             {"source": "mixture", "name": None, "mixture": [{"weight": 1.0, "source": "files", "path": "/a.jsonl"},
                                                             {"weight": 2.0, "source": "files", "path": "/b.jsonl"}]},
             {"validation": 0.0, "evaluation": {"clean": {"source": "files", "path": "/e.jsonl"}}},
             {"source": "factory", "name": None, "factory": "m:f"},
             {"task": "custom", "task_factory": "m:f"},
             {"task": "custom", "task_factory": "m:f", "task_options": {"a": 1}}],
    "batch": [{"ramp": [{"until_step": 3, "effective": 6}]}, {"effective": 24, "accumulation": 4}, {"per_device": 6, "accumulation": 1},
              {"gpus": 4, "accumulation": 1}, {"remainder": "carry"}, {"weighting": "token"},
              {"accumulation": 1, "effective": 6}],
    "cluster": [{"gpu": "b200"}, {"gpus_per_node": 1, "nodes": 2},
                {"gpu": {"name": "mine", "memory_gib": 48.0, "bf16_tflops": 155.0}}, {"nodes": {"min": 1, "max": 1}}],
    "strategy": [{"name": "fsdp"}, {"name": "fsdp", "shard": "node"}, {"offload": "optimizer"},
                 {"name": "fsdp", "reshard": "step"}, {"name": "fsdp", "reduce": "step"}],
    "precision": "bf16",
    "optimizer": [{"name": "adam"}, {"lr": 2e-3}, {"weight_decay": 0.1}, {"betas": [0.8, 0.9]}, {"eps": 1e-6},
                  {"name": "sgd", "momentum": 0.5}, {"name": "sgd", "momentum": 0.5, "nesterov": True},
                  {"groups": [{"match": "a", "lr_ratio": 0.5}]},
                  {"groups": [{"match": "a", "weight_decay": 0.5}]}, {"layer_decay": 0.5},
                  {"max_grad_norm": None}, {"implementation": "foreach"},
                  {"name": "custom", "factory": "m:f"}, {"name": "custom", "factory": "m:f", "states": 1},
                  {"name": "custom", "factory": "m:f", "options": {"a": 1}},
                  {"lr_scaling": {"rule": "sqrt", "reference_batch": 3}},
                  {"lr_scaling": {"rule": "sqrt", "reference_batch": 6}}],
    "objective": [{"name": "custom", "factory": "m:f"},
                  {"name": "custom", "factory": "m:f", "options": {"a": 1}},
                  {"name": "dpo", "beta": 0.2}, {"name": "dpo", "loss_type": "hinge"}, {"name": "dpo", "label_smoothing": 0.1},
                  {"name": "dpo", "sft_weight": 0.1}, {"name": "simpo", "gamma": 0.5}, {"name": "kto", "desirable_weight": 2.0},
                  {"name": "kto", "undesirable_weight": 2.0}, {"name": "dpo", "reference": "adapter_off"}],
    "loss": [{"chunked": True}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}],
    "schedule": [{"name": "cosine"}, {"warmup_steps": 3}, {"warmup_ratio": 0.5}, {"min_lr_ratio": 0.5},
                 {"warmup_epochs": 0.01}, {"warmup_start_ratio": 0.1}, {"min_lr": 1e-5}, {"horizon_steps": 99},
                 {"unit": "epoch"}, {"name": "cosine_restarts", "cycles": 2},
                 {"name": "polynomial", "power": 2.0}, {"name": "wsd", "decay_ratio": 0.5},
                 {"name": "one_cycle", "start_ratio": 0.1}, {"name": "piecewise", "milestones": {"0.5": 0.1}}],
    "duration": [{"steps": 21}, {"steps": None, "epochs": 2}, {"steps": None, "tokens": 5000}],
    "evaluation": [*({"after": [{"run": ["x"], **more}]} for more in AFTER), {"every_steps": 6}, {"every_steps": None, "every_epochs": 1}, {"at_start": True}, {"per_device": 5}],
    "ema": [{"decay": 0.9}, {"decay": 0.9, "evaluate": False}],
    "early_stopping": [{"metric": "eval/accuracy"}, {"mode": "max"}, {"patience": 6}, {"min_delta": 0.5}],
    "checkpoint": [{"every_steps": 11}, {"every_epochs": 0.5}, {"every_minutes": 5.0}, {"keep_last": 3}, {"keep_best": 0},
                   {"keep_every": 4}, {"async": False}, {"on_error": "continue"}],
    "anomalies": [{"max_skipped": 5}, {"spike_sigma": 4.0}, {"spike_window": 50}, {"skip_spikes": True}],
    "launch": [{"launcher": "accelerate"}, {"max_restarts": 1}, {"hang_timeout_s": 5.0}, {"hang_factor": 5.0}, {"straggler_ratio": None}],
    "logging": [{"every_steps": 3}, {"wandb": {"project": "p"}}, {"wandb": {"project": "p", "mode": "online"}},
                {"wandb": {"project": "p", "entity": "e"}}, {"tensorboard": True}, {"noise_scale": True}],
    "start_from": [{"run": "/r/x-1"}, {"run": "/r/x-1", "what": "state", "step": 3}, {"run": "/r/x-1", "training_sha256": "a"}],
}  # fmt: skip
NEEDS_TEXT = {"model.neftune_alpha", "loss.chunked", "loss.z_loss", "duration.tokens"}
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
            if "objective.name" in keys and change["name"] != "custom":
                data = {"data": {"task": "preference", "validation": 0.0}}
                start = merge(
                    merge(base, TEXT), {**data, "early_stopping": None, "evaluation": None}
                )
                start = merge(
                    start, {"model": {"adapter": {}}, "objective": {"name": change["name"]}}
                )
            if "strategy.offload" in keys:
                start = merge(
                    base, {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero1"}}
                )
            changed = merge(start, {section: change})
            if isinstance(change, dict) and "task" in change:
                changed["early_stopping"] = None
            for one in (start, changed):
                if one["model"].get("architecture"):
                    one["model"] = {**one["model"], "config": {}}
            before, after = (planned(validate(r, "r")) for r in (start, changed))
            assert before != after, f"{section}: {change}"
            covered |= set(keys)
            if isinstance(change, dict) and "lr_scaling" in change:
                covered |= {"optimizer.lr_scaling.rule", "optimizer.lr_scaling.reference_batch"}
            if isinstance(change, dict) and change.get("wandb"):
                covered |= {"logging.wandb.project", "logging.wandb.mode", "logging.wandb.entity"}
            if isinstance(change, dict) and "audio" in change:
                covered |= {f"data.audio.{key}" for key in change["audio"]}
            if isinstance(change, dict) and "image" in change:
                covered |= {f"data.image.{key}" for key in (*change["image"], "options")}
                covered |= {
                    "data.image.rand_augment.operations",
                    "data.image.rand_augment.magnitude",
                }
            if section in ("batch", "cluster", "model", "optimizer", "evaluation"):
                covered |= {
                    f"{section}.{key}.{name}"
                    for key, value in change.items()
                    for inner in (value if isinstance(value, list) else [value])
                    if isinstance(inner, dict)
                    for name in inner
                }
    assert not set(_fields(Recipe)) - covered


def planned(recipe: Recipe) -> model.Plan:
    """Its plan; that of a run which begins from another one, from a checkpoint of the same model."""
    parent = None
    if recipe.start_from:
        own = recipe.model_copy(update={"start_from": None})
        parent = Parent("/r/x-1", "/r/x-1/c", "0", "a", own, None, Place(3, 36, 36))
    return resolve(recipe, World(parent=parent))


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


READ_BY_SCRIPTS = {
    "MemoryFacts.unit",
    "Plan.plan_version",
}
"""Of `drumline plan --json` only."""


def test_every_plan_field_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is shown, rendered, recorded, trained and compared: each field of it is asked for by someone.

    Watched while it happens, one rank in this process; what only `plan/model.py` itself reads does not count.
    """
    classes = [
        cls
        for cls in vars(model).values()
        if isinstance(cls, type)
        and dataclasses.is_dataclass(cls)
        and cls.__module__ == model.__name__
    ]
    seen = set()
    for cls in classes:

        def watched(self: Any, name: str) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if "/drumline" in caller and not caller.endswith("plan/model.py"):
                seen.add(f"{type(self).__name__}.{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", watched)
    use_everything(tmp_path)
    fields = {
        f"{cls.__name__}.{field.name}" for cls in classes for field in dataclasses.fields(cls)
    }
    assert sorted(fields - seen) == sorted(READ_BY_SCRIPTS)


def use_everything(folder: Path) -> None:
    """What the product does with a plan, as far as one process can do it."""
    import torch
    import torch.distributed as dist

    from drumline.runs.folder import RunFolder
    from drumline.runs.record import attempt_entry, new_record
    from drumline.secrets import Secrets
    from drumline.session.planning import fixed, make_plan
    from drumline.session.prepare import prepare_data
    from drumline.session.show import plan_table
    from drumline.train.loop import train

    big = make_plan(load_recipe("llama-1b-8xh100", ["batch.per_device=32", "batch.accumulation=2"]))
    assert fixed(big).memory.fits
    assert big.memory.fits is False
    plan_table(big)
    recipe = validate(tiny_recipe(batch={"gpus": 1, "accumulation": 4, "ramp": [{"until_step": 2, "effective": 4}]}, duration={"steps": 4},
                                  evaluation={"every_steps": 2}), "r")  # fmt: skip
    prepare_data(recipe)
    plan = make_plan(recipe)
    plan_table(plan)
    pretrained = dataclasses.replace(plan.cost, weights_bytes=10**9, load_seconds=4.0)
    plan_table(dataclasses.replace(plan, cost=pretrained))
    mixed = dataclasses.replace(plan.data, mixture=[model.SourceFacts("a", 3, 2)])
    plan_table(dataclasses.replace(plan, data=mixed))
    job = Job(plan_file=folder / "plan-0.json", run_folder=folder, attempt=0, python=sys.executable,
              node_rank=0, host="127.0.0.1", port=1)  # fmt: skip
    for render in LAUNCHERS.values():
        render(plan, job)
    new_record(plan, ["drumline"], Secrets({}))
    attempt_entry(plan, "start")
    (folder / "checkpoints").mkdir()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(plan, RunFolder(folder).path, torch.device("cpu"))
        goes_on = recipe.model_copy(
            update={
                "start_from": StartFrom(
                    run=str(folder / "checkpoints/step-00000004"), what="state"
                ),
                "duration": Duration(steps=6),
            }
        )
        after = make_plan(goes_on)
        plan_table(after)
        (folder / "after/checkpoints").mkdir(parents=True)
        train(after, folder / "after", torch.device("cpu"))
    finally:
        dist.destroy_process_group()
