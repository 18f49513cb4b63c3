"""Buffers and gradients of DeepSpeed's ZeRO, release 0.19.8, under drumline's configuration.

Read from its source (stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py). DeepSpeed cannot be
traced without a GPU, so its ranges are wider. Weights are fp32, also under torch_autocast.
"""

import math

from drumline.architectures.shapes import layer_tensors, outer_tensors
from drumline.memory.load import Load

BUCKET_ELEMENTS = 500_000_000
"""`reduce_bucket_size` and `allgather_bucket_size`; the buffers have this size for models of any size."""

REUSED_ELEMENTS = 500_000_000
"""Elements of gathered weights that stay allocated between forward and backward (approximate)."""

PREFETCHED_ELEMENTS = 50_000_000
"""`stage3_prefetch_bucket_size`."""


def buckets(load: Load) -> int:
    """Bytes of the buckets that gradients are reduced from.

    Stages 1 and 2: two fp32 buckets per reduced dtype (fp32, and under autocast the 16-bit dtype).
    Stage 3: one bucket per reduced dtype, in that dtype.
    """
    if load.strategy == "zero3":
        return BUCKET_ELEMENTS * (6 if load.low else 4)
    return 2 * 4 * BUCKET_ELEMENTS * (2 if load.low else 1)


def buckets_come_and_go(load: Load) -> bool:
    """Whether the buckets exist only during the backward."""
    return load.strategy == "zero2" or (load.strategy == "zero1" and load.accumulation == 1)


def gradients(load: Load) -> int:
    """Elements of gradients on a rank.

    Stage 1: the whole model's, plus the rank's partition with accumulation. Stage 2: the partition, twice
    with accumulation. Stage 3: the partition. With offload: the whole model's in stage 1, else none.
    """
    part = -(-load.shape.parameters // load.shard_ranks)
    if load.offload:
        return load.shape.parameters if load.strategy == "zero1" else 0
    if load.strategy == "zero1":
        return load.shape.parameters + (part if load.accumulation > 1 else 0)
    return part * (2 if load.strategy == "zero2" and load.accumulation > 1 else 1)


def gathered(load: Load) -> int:
    """Bytes of stage 3's gathered fp32 weights: reused and prefetched ones, or the largest single weight."""
    tensors = {**outer_tensors(load.shape), **layer_tensors(load.shape)}
    largest = max(math.prod(sizes) for sizes in tensors.values())
    window = min(load.shape.parameters, REUSED_ELEMENTS + PREFETCHED_ELEMENTS)
    return 4 * max(window, largest)
