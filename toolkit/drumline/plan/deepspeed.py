"""DeepSpeed's configuration; sets every relevant key instead of relying on DeepSpeed's defaults."""

from typing import Any

from drumline.memory.zero import BUCKET_ELEMENTS, PREFETCHED_ELEMENTS
from drumline.plan.model import Plan
from drumline.recipe.precision import PRECISIONS

STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """The plan's DeepSpeed configuration, as a JSON object.

    The batch sizes only satisfy DeepSpeed's own check: drumline marks each step's last micro-batch,
    weights the loss and passes its own optimizer. Gradients are reduced in fp32, but under autocast
    DeepSpeed reduces those of matrices in the 16-bit dtype, regardless of communication_data_type.
    """
    recipe, batch = plan.recipe, plan.batch
    stage = STAGES[recipe.strategy.name]
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
            "overlap_comm": recipe.cluster.gpu != "cpu",
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "reduce_scatter": True,
            "round_robin_gradients": False,
        }
    if stage in (1, 2):
        config["zero_optimization"]["allgather_bucket_size"] = BUCKET_ELEMENTS
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_prefetch_bucket_size": PREFETCHED_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
            "sub_group_size": 1_000_000_000,
        }
    if recipe.strategy.offload == "optimizer":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if dtype := PRECISIONS[recipe.precision].autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return config
