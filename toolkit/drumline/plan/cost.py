"""A rough estimate of step time, used only to rank changes of one recipe. Pure.

Assumes compute at a fixed share of the GPU's peak, communication at fixed rates, and no overlap. The
absolute seconds mean little; the ratio of two plans of one recipe says which costs more.
"""

from drumline.architectures.gpus import find_gpu
from drumline.architectures.shapes import ModelShape
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision

UTILISATION = 0.4
"""Share of the GPU's peak FLOP/s that a well-tuned run reaches (Chowdhery et al. 2022: 0.46 for PaLM)."""

NODE_BYTES_PER_S = 150e9
CLUSTER_BYTES_PER_S = 25e9
HOST_BYTES_PER_S = 20e9
"""Assumed bandwidths per rank: within a node, between nodes, and to the host."""

FALLBACK_FLOPS = 100e12
_REPEATED = {"none": 0.0, "selective": 0.1, "full": 1.0}
"""Share of the layers' forward that is repeated; that of selective is a guess, for elementwise operations."""


def gpu_seconds(plan: Plan, shape: ModelShape) -> float:
    """GPU time of one optimizer step in seconds: step time × GPUs."""
    return plan.batch.gpus * (_compute_seconds(plan, shape) + _communication_seconds(plan, shape))


def _compute_seconds(plan: Plan, shape: ModelShape) -> float:
    """Compute time of one step.

    Activation checkpointing repeats the forward of all layers, or a small share of it if selective; a chunked
    loss repeats that of the head.
    """
    recipe = plan.recipe
    total = float(plan.cost.flops_per_step or 0)
    head = shape.vocabulary * shape.hidden if shape.classes is None else 0
    layers = shape.active_in_layers
    again = layers * _REPEATED[recipe.model.activation_checkpointing]
    again += head if recipe.loss.chunked else 0
    passes = (
        3 if plan.cost.trained == plan.cost.parameters else 2
    )  # a frozen weight has no gradient
    total *= 1 + again / (passes * (layers + head))
    peak = find_gpu(recipe.cluster.gpu).narrow_flops or FALLBACK_FLOPS
    return total / plan.batch.gpus / (peak * UTILISATION)


def _communication_seconds(plan: Plan, shape: ModelShape) -> float:
    """Time for the bytes a rank sends in a step (Rajbhandari et al. 2020, §7) and for offload to the host.

    On several nodes all bytes are assumed to take the link between nodes.
    """
    recipe, batch = plan.recipe, plan.batch
    precision = find_precision(recipe.precision, recipe.strategy.name)
    narrow, width = precision.computed, precision.stored
    count, k, name = shape.parameters, batch.accumulation, recipe.strategy.name
    trained = plan.cost.trained or count
    if batch.gpus == 1:
        sent = 0
    elif name in ("fsdp", "zero3"):
        gathers = 2 if name == "fsdp" else 3
        sent = k * (count * gathers * narrow + trained * width)
    elif name == "zero2":
        sent = trained * (k * width + width)
    else:
        sent = 2 * trained * width
    rate = NODE_BYTES_PER_S if batch.nodes == 1 else CLUSTER_BYTES_PER_S
    offloaded = 4.0 * trained * width / batch.gpus if recipe.strategy.offload != "none" else 0.0
    if recipe.model.activation_offload:
        tokens = shape.tokens(plan.data.row_tokens or recipe.data.sequence_length)
        rows = batch.per_device * recipe.objective.facts.sequences * tokens
        offloaded += 2 * k * shape.layers * rows * shape.hidden * narrow
    return sent / rate + offloaded / HOST_BYTES_PER_S
