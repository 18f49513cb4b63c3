"""What other tools call things, as keys and values of a recipe. Pure.

The names are those of transformers' TrainingArguments, which TRL, LLaMA-Factory and many scripts share, of
peft, axolotl, torchtune and DeepSpeed. `keys_for` serves the messages for unknown keys and `drumline import`
alike, so that both say the same.
"""

import json
from collections.abc import Callable
from typing import Any

Keys = dict[str, Any]
"""Values by the dotted keys of a recipe."""


class NotOffered(Exception):
    """A value that no recipe can state; the message says why, and what to do instead."""


RENAMED = {
    "per_device_train_batch_size": "batch.per_device",
    "micro_batch_size": "batch.per_device",
    "train_micro_batch_size_per_gpu": "batch.per_device",
    "batch_size_per_device": "batch.per_device",
    "gradient_accumulation_steps": "batch.accumulation",
    "grad_accum": "batch.accumulation",
    "grad_accum_steps": "batch.accumulation",
    "train_batch_size": "batch.effective",
    "global_batch_size": "batch.effective",
    "seed": "seed",
    "data_seed": "seed",
    "num_gpus": "batch.gpus",
    "nproc_per_node": "cluster.gpus_per_node",
    "num_processes": "batch.gpus",
    "nnodes": "cluster.nodes",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.max_grad_norm",
    "gradient_clipping": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "num_epochs": "duration.epochs",
    "num_train_epochs": "duration.epochs",
    "epochs": "duration.epochs",
    "max_steps": "duration.steps",
    "num_steps": "duration.steps",
    "warmup_ratio": "schedule.warmup_ratio",
    "num_warmup_steps": "schedule.warmup_steps",
    "eval_steps": "evaluation.every_steps",
    "per_device_eval_batch_size": "evaluation.per_device",
    "eval_batch_size": "evaluation.per_device",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "logging.every_steps",
    "early_stopping_patience": "early_stopping.patience",
    "label_smoothing_factor": "loss.label_smoothing",
    "neftune_noise_alpha": "model.neftune_alpha",
    "max_seq_length": "data.sequence_length",
    "model_max_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "cutoff_len": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "lora_r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank",
    "lora_dropout": "model.adapter.dropout",
    "use_dora": "model.adapter.dora",
    "peft_use_dora": "model.adapter.dora",
    "use_rslora": "model.adapter.rslora",
    "peft_use_rslora": "model.adapter.rslora",
    "dataloader_num_workers": "data.workers",
    "torch_compile": "model.compile",
    "compile": "model.compile",
    "wandb_project": "logging.wandb.project",
    "wandb_entity": "logging.wandb.entity",
}
"""Keys whose values mean the same here."""

_FLOATS = {
    "lr", "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "gradient_clipping",
    "clip_grad_norm", "warmup_ratio", "num_train_epochs", "num_epochs", "epochs",
    "label_smoothing_factor", "neftune_noise_alpha", "lora_dropout",
}  # fmt: skip
"""Numbers that other tools also take as whole ones, or as texts such as 2e-5, which YAML 1.1 reads as one."""

OPTIMIZERS: dict[str, Keys] = {
    "adamw_torch": {"optimizer.name": "adamw"},
    "adamw_torch_fused": {"optimizer.name": "adamw", "optimizer.implementation": "fused"},
    "adamw_hf": {"optimizer.name": "adamw"},
    "adamw_apex_fused": {"optimizer.name": "adamw", "optimizer.implementation": "fused"},
    "adamw_bnb_8bit": {"optimizer.name": "adamw_8bit"},
    "adamw_8bit": {"optimizer.name": "adamw_8bit"},
    "paged_adamw_8bit": {"optimizer.name": "adamw_8bit"},
    "paged_adamw_32bit": {"optimizer.name": "adamw"},
    "paged_adamw": {"optimizer.name": "adamw"},
    "adamw": {"optimizer.name": "adamw"},
    "adam": {"optimizer.name": "adam"},
    "sgd": {"optimizer.name": "sgd"},
    "adafactor": {"optimizer.name": "adafactor"},
    "lion": {"optimizer.name": "lion"},
    "lion_32bit": {"optimizer.name": "lion"},
    "muon": {"optimizer.name": "muon"},
}
"""Names of optimizers; a paged one has the same states, and moves them to the host where memory is short."""

SCHEDULES: dict[str, Keys] = {
    "linear": {"schedule.name": "linear"},
    "cosine": {"schedule.name": "cosine"},
    "constant": {"schedule.name": "constant"},
    "constant_with_warmup": {"schedule.name": "constant"},
    "cosine_with_min_lr": {"schedule.name": "cosine"},
    "cosine_with_restarts": {"schedule.name": "cosine_restarts"},
    "polynomial": {"schedule.name": "polynomial"},
    "inverse_sqrt": {"schedule.name": "inverse_sqrt"},
    "warmup_stable_decay": {"schedule.name": "wsd"},
    "one_cycle": {"schedule.name": "one_cycle"},
    "get_cosine_schedule_with_warmup": {"schedule.name": "cosine"},
    "WarmupLR": {"schedule.name": "constant"},
    "WarmupDecayLR": {"schedule.name": "linear"},
    "WarmupCosineLR": {"schedule.name": "cosine"},
}
"""Names of learning rate schedules."""


STRATEGIES: dict[str, Keys] = {
    "full_shard": {"strategy.name": "fsdp"},
    "fully_shard": {"strategy.name": "fsdp"},
    "fully_sharded_data_parallel": {"strategy.name": "fsdp"},
    "fsdp1": {"strategy.name": "fsdp"},
    "fsdp2": {"strategy.name": "fsdp"},
    "hybrid_shard": {"strategy.name": "fsdp", "strategy.shard": "node"},
    "hsdp": {"strategy.name": "fsdp", "strategy.shard": "node"},
    "shard_grad_op": {"strategy.name": "fsdp", "strategy.reshard": "backward"},
    "no_shard": {"strategy.name": "ddp"},
    "dp": {"strategy.name": "ddp"},
    "data_parallel": {"strategy.name": "ddp"},
    "distributed_data_parallel": {"strategy.name": "ddp"},
    "multi_gpu": {"strategy.name": "ddp"},
    "zero0": {"strategy.name": "ddp", "launch.launcher": "deepspeed"},
    "deepspeed": {"strategy.name": "zero3", "launch.launcher": "deepspeed"},
} | {
    spelling: {"strategy.name": f"zero{stage}", "launch.launcher": "deepspeed"}
    for stage in (1, 2, 3)
    for spelling in (f"zero_{stage}", f"stage{stage}", f"stage_{stage}", f"zero_stage_{stage}",
                     f"deepspeed_stage_{stage}", f"deepspeed_zero{stage}", f"ds_zero{stage}")
}  # fmt: skip
"""Ways of splitting the state over the ranks: FSDP's, Lightning's, accelerate's and DeepSpeed's names."""


_OF_SCHEDULES = {
    "min_lr_rate": "schedule.min_lr_ratio",
    "min_lr": "schedule.min_lr",
    "lr_end": "schedule.min_lr",
    "num_cycles": "schedule.cycles",
    "power": "schedule.power",
}
"""Options of transformers' schedules."""

_ATTENTION = {
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "fa2": "flash",
    "flash": "flash",
    "sdpa": "sdpa",
    "auto": "sdpa",
    "eager": "eager",
    "disabled": "eager",
    "off": "eager",
}


def keys_for(name: str, value: Any) -> Keys | None:
    """The recipe's keys and values for what another tool calls `name`; None for a name that is not known.

    NotOffered where the value has no counterpart.
    """
    if name in RENAMED:
        return {RENAMED[name]: number_of(name, value)}
    convert = _CONVERTED.get(name)
    return None if convert is None else convert(value)


def number_of(name: str, value: Any) -> Any:
    """The value, as the number that a recipe needs where other tools take whole numbers or texts for it."""
    if name not in _FLOATS or isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _optimizer(value: Any) -> Keys:
    found = OPTIMIZERS.get(str(value)) or OPTIMIZERS.get(str(value).lower())
    if found is None:
        raise NotOffered(
            f"optimizer {value} is not offered. Nearest: adamw, or optimizer.name custom"
        )
    return dict(found)


def _schedule(value: Any) -> Keys:
    found = SCHEDULES.get(str(value)) or SCHEDULES.get(str(value).rpartition(".")[2])
    if found is None:
        raise NotOffered(f"schedule {value} is not offered. Nearest: linear or cosine")
    return dict(found)


def _strategy(value: Any) -> Keys:
    found = STRATEGIES.get(str(value).lower().replace("-", "_"))
    return dict(found) if found else {}


def _bf16(value: Any) -> Keys:
    if value in (True, "true", "full"):
        return {"precision": "bf16"}
    if value in ("auto", None):
        return {"precision": "bf16"}
    return {}


def _fp16(value: Any) -> Keys:
    return {"precision": "fp16"} if value in (True, "true") else {}


def _checkpointing(value: Any) -> Keys:
    if value in (True, "true", "unsloth", "full"):
        return {"model.activation_checkpointing": "full"}
    if value in ("offload", "offload_disk"):
        return {
            "model.activation_checkpointing": "full",
            "model.activation_offload": True,
        }
    return {}


def _attention(value: Any) -> Keys:
    if str(value) not in _ATTENTION:
        raise NotOffered(f"attention {value} is not offered. Nearest: model.attention=sdpa")
    return {"model.attention": _ATTENTION[str(value)]}


def _targets(value: Any) -> Keys:
    listed = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
    if listed in (["all"], ["all-linear"], ["all_linear"]):
        return {"model.adapter.targets": "all-linear"}
    return {"model.adapter.targets": listed}


def _in_4_bits(value: Any) -> Keys:
    return {"model.quantization": "nf4"} if value in (True, "true", 4, "4") else {}


def _in_8_bits(value: Any) -> Keys:
    return {"model.quantization": "int8"} if value in (True, "true") else {}


def _bits(value: Any) -> Keys:
    found = {4: "nf4", 8: "int8"}.get(int(value))
    if found is None:
        raise NotOffered(f"{value} bits are not offered. Nearest: model.quantization=nf4")
    return {"model.quantization": found}


def _warmup(value: Any) -> Keys:
    """A number of steps or, as transformers 5 has it, a share below 1."""
    number = float(value)
    if 0 < number < 1:
        return {"schedule.warmup_ratio": number}
    return {"schedule.warmup_steps": int(number)}


def _of_the_schedule(value: Any) -> Keys:
    """`lr_scheduler_kwargs`, as keys and values or as the JSON of them on a command line."""
    given = json.loads(value) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise NotOffered(f"{value!r} is no mapping of options. Nearest: min_lr_rate=0.1")
    unknown = sorted(set(given) - set(_OF_SCHEDULES))
    if unknown:
        raise NotOffered(
            f"{', '.join(unknown)}: of {', '.join(_OF_SCHEDULES)} only. Nearest: keys of schedule"
        )
    return {_OF_SCHEDULES[key]: one for key, one in given.items()}


def _packing(value: Any) -> Keys:
    return {"data.packing": "documents"} if value in (True, "true") else {}


def _report_to(value: Any) -> Keys:
    listed = [value] if isinstance(value, str) else list(value or [])
    found: Keys = {}
    if "tensorboard" in listed:
        found["logging.tensorboard"] = True
    if {"wandb", "all"} & set(listed):
        found["logging.wandb.project"] = "imported"
    return found


def _beta(place: int) -> Callable[[Any], Keys]:
    return lambda value: {f"optimizer.betas.{place}": float(value)}


def _alpha(value: Any) -> Keys:
    return {"model.adapter.alpha": float(value)}


_CONVERTED: dict[str, Callable[[Any], Keys]] = {
    "optim": _optimizer,
    "lr_scheduler_type": _schedule,
    "lr_scheduler": _schedule,
    "lr_scheduler_kwargs": _of_the_schedule,
    "sharding_strategy": _strategy,
    "bf16": _bf16,
    "bfloat16": _bf16,
    "fp16": _fp16,
    "float16": _fp16,
    "gradient_checkpointing": _checkpointing,
    "enable_activation_checkpointing": _checkpointing,
    "activation_checkpointing": _checkpointing,
    "attn_implementation": _attention,
    "flash_attn": _attention,
    "lora_target_modules": _targets,
    "lora_target": _targets,
    "lora_alpha": _alpha,
    "load_in_4bit": _in_4_bits,
    "load_in_8bit": _in_8_bits,
    "quantization_bit": _bits,
    "warmup_steps": _warmup,
    "packing": _packing,
    "sample_packing": _packing,
    "report_to": _report_to,
    "adam_beta1": _beta(0),
    "adam_beta2": _beta(1),
}
"""Keys whose values have another form here."""
