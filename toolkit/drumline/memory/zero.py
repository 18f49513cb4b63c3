"""What DeepSpeed's ZeRO keeps beside the weights, in its 0.19.8 release under drumline's configuration.

Read in its sources (stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py); unlike the rest it
cannot be traced without a GPU, so the ranges are wider. Weights are fp32, also under torch_autocast.
"""

from drumline.architectures.shapes import layer_tensors, outer_tensors
from drumline.memory.load import Load

BUCKET_ELEMENTS = 500_000_000
"""`reduce_bucket_size` and `allgather_bucket_size`; the buffers have this size whatever the model's."""

REUSED_ELEMENTS = 500_000_000
"""Of the gathered weights about so many stay from the end of the forward to the backward."""

PREFETCHED_ELEMENTS = 50_000_000
"""`stage3_prefetch_bucket_size`."""


def buckets(load: Load) -> int:
    """Bytes of the buffers that gradients are reduced from.

    Stages 1 and 2: two of fp32 for every type that is reduced (under autocast also the narrow one).
    Stage 3: one of each type, in that type.
    """
    if load.strategy == "zero3":
        return BUCKET_ELEMENTS * (6 if load.low else 4)
    return 2 * 4 * BUCKET_ELEMENTS * (2 if load.low else 1)


def buckets_come_and_go(load: Load) -> bool:
    """Whether the buffers are there in the backward only."""
    return load.strategy == "zero2" or (load.strategy == "zero1" and load.accumulation == 1)


def gradients(load: Load) -> int:
    """Elements: stage 1 all of them and its own part; stage 2 its part, twice once it adds to it."""
    part = -(-load.shape.parameters // load.shard_ranks)
    if load.offload:
        return load.shape.parameters if load.strategy == "zero1" else 0
    if load.strategy == "zero1":
        return load.shape.parameters + (part if load.accumulation > 1 else 0)
    return part * (2 if load.strategy == "zero2" and load.accumulation > 1 else 1)


def gathered(load: Load) -> int:
    """Bytes of stage 3's gathered weights, in fp32: what is reused, fetched ahead, or one large weight."""
    tensors = {**outer_tensors(load.shape), **layer_tensors(load.shape)}
    largest = max(rows * columns for rows, columns in tensors.values())
    window = min(load.shape.parameters, REUSED_ELEMENTS + PREFETCHED_ELEMENTS)
    return 4 * max(window, largest)
