"""DeepSpeed's configuration; sets every relevant key instead of relying on DeepSpeed's defaults."""

from typing import Any

from drumline.memory.load import zero_sizes
from drumline.memory.zero import accumulates_in_fp32
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision

ALLGATHER_ELEMENTS = 500_000_000
"""DeepSpeed's default; stages 1 and 2 gather in place, so this takes no memory."""
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """The plan's DeepSpeed configuration, as a JSON object.

    The batch sizes only satisfy DeepSpeed's own check: drumline marks each step's last micro-batch,
    weights the loss and passes its own optimizer. Gradients are reduced in fp32, but under autocast
    DeepSpeed reduces those of matrices in the 16-bit dtype, regardless of communication_data_type.

    `bf16` under ZeRO is DeepSpeed's own: 16-bit weights and gradients, fp32 masters and optimizer state.
    Gradients are reduced in bf16; `accumulates_in_fp32` says where they are summed in fp32.
    """
    recipe, batch = plan.recipe, plan.batch
    stage, sizes = STAGES[recipe.strategy.name], zero_sizes(plan.cost.trained)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation,
        "train_batch_size": batch.effective,
        "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": stage},
    }
    if stage:
        config["zero_optimization"] |= {
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": sizes.bucket,
            "reduce_scatter": True,
            "round_robin_gradients": False,
        }
    if stage in (1, 2):
        config["zero_optimization"]["allgather_bucket_size"] = ALLGATHER_ELEMENTS
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_max_live_parameters": sizes.live,
            "stage3_max_reuse_distance": sizes.live,
            "stage3_prefetch_bucket_size": sizes.prefetch,
            "stage3_param_persistence_threshold": sizes.persistent,
            "sub_group_size": sizes.sub_group,
        }
    if recipe.strategy.offload == "optimizer":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    precision = find_precision(recipe.precision, recipe.strategy.name)
    if precision.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": precision.autocast}
    if precision.has_masters:
        config |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "communication_data_type": "bf16",
        }
        has_offload = recipe.strategy.offload == "optimizer"
        if accumulates_in_fp32(stage, batch.accumulation, has_offload):
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
