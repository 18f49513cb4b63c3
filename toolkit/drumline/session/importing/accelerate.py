"""accelerate's configuration file."""

from typing import Any

from drumline.session.importing import deepspeed
from drumline.session.importing.draft import MEANINGLESS, UNSUPPORTED, Draft
from drumline.session.importing.fsdp import take_sharding

_MEANINGLESS = (
    "compute_environment", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend",
    "same_network", "main_training_function", "debug", "enable_cpu_affinity", "downcast_bf16",
    "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "dynamo_config", "main_process_address",
)  # fmt: skip


def is_of(keys: dict[str, Any]) -> bool:
    """Whether a file's keys are accelerate's."""
    return ("distributed_type" in keys and "compute_environment" in keys) or "num_machines" in keys


def take(draft: Draft, given: dict[str, Any]) -> None:
    """Carry over a configuration."""
    given = dict(given)
    kind = str(given.pop("distributed_type", "NO")).upper()
    of_deepspeed = dict(given.pop("deepspeed_config", None) or {})
    of_fsdp = dict(given.pop("fsdp_config", None) or {})
    if kind == "DEEPSPEED":
        deepspeed.set_stage(draft, int(of_deepspeed.pop("zero_stage", 2) or 0))
        if of_deepspeed.pop("offload_optimizer_device", "none") not in ("none", None):
            draft.set("strategy.offload", "optimizer")
        for name in ("gradient_accumulation_steps", "gradient_clipping"):
            value = of_deepspeed.pop(name, None)
            if isinstance(value, int | float):
                draft.take(name, value)
        for key, value in of_deepspeed.items():
            draft.leave(
                f"deepspeed_config.{key}", value, MEANINGLESS, "the engine is set up by the recipe"
            )
    elif kind == "FSDP":
        draft.set("strategy.name", "fsdp")
        _take_fsdp(draft, of_fsdp)
    elif kind in ("MULTI_GPU", "NO", "MULTI_CPU"):
        draft.set("strategy.name", "ddp", weakly=True)
    precision = str(given.pop("mixed_precision", "no"))
    if precision in ("bf16", "fp16"):
        draft.set("precision", precision, weakly=True)
        draft.taken += 1
    ranks, machines = given.pop("num_processes", None), int(given.pop("num_machines", 1) or 1)
    if ranks:
        draft.set("batch.gpus", int(ranks))
        draft.set("cluster.gpus_per_node", max(1, int(ranks) // machines))
        draft.taken += 1
    steps = given.pop("gradient_accumulation_steps", None)
    if isinstance(steps, int):
        draft.take("gradient_accumulation_steps", steps, weakly=True)
    for key, value in given.items():
        if key in _MEANINGLESS and value not in (None, False, [], {}):
            draft.leave(
                key,
                value,
                MEANINGLESS,
                "where a run starts is said on the command line or by a site",
            )
        elif key not in _MEANINGLESS and value not in (None, [], {}):
            draft.leave(key, value, UNSUPPORTED, "it is not used here")


def _take_fsdp(draft: Draft, given: dict[str, Any]) -> None:
    take_sharding(draft, (), given)
    if given.pop("fsdp_offload_params", False):
        draft.leave("fsdp_offload_params", True, UNSUPPORTED, "weights stay on the device")
    if given.pop("fsdp_activation_checkpointing", False):
        draft.set("model.activation_checkpointing", "full")
    draft.taken += len(given) + 1
