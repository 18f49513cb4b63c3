"""The input of the memory estimate: everything that one rank's peak depends on. Pure."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import layers_of
from drumline.memory.attention import Kernel, choose_kernel
from drumline.recipe.precision import Precision, find_precision

CHUNK_TOKENS = 1024
"""Tokens whose logits are alive at once with a chunked loss (`train/objectives/cross_entropy.py`)."""


def chunks_of(rows: int, length: int) -> int:
    """Chunks that a micro-batch of so many rows of at most `length` tokens is cut into along its length."""
    return -(-rows * length // CHUNK_TOKENS)


@dataclass(frozen=True)
class ZeroSizes:
    """DeepSpeed's buffer sizes and limits, in elements, as in its configuration (`plan/deepspeed.py`).

    `bucket`: gradients that are reduced at once. `live`: weights that stage 3 keeps gathered, at most, and
    the distance within which a weight must be used again to be kept. `prefetch`: gathered ahead.
    `persistent`: smaller weights are always whole. `sub_group`: updated at once. The limits are DeepSpeed's
    defaults, but for the bucket, which is a tenth: three buffers of its size are alive at once.
    """

    bucket: int = 50_000_000
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    sub_group: int = 1_000_000_000


def zero_sizes(parameters: int | None) -> ZeroSizes:
    """The sizes for a model; its bucket is not larger than all `parameters`, if they are known."""
    sizes = ZeroSizes()
    return replace(sizes, bucket=min(sizes.bucket, parameters or sizes.bucket))


Checkpointing = Literal["none", "full", "selective"]


class LayerKind(NamedTuple):
    """What differs between the layers of a model; `segment`: the number of its shape in `layer_shapes`.

    `frozen`: names of its weights that are not trained.
    """

    is_masked: bool
    is_rotated: bool
    segment: int
    frozen: frozenset[str] = frozenset()


WIDENED_AT_ONCE = 1 << 22
"""Quantised weights that are widened at a time through fp32 temporaries (`train/models/quantized.py`)."""

EMA_BYTES = 4
"""Bytes of the average of a weight, which is fp32 (`train/ema.py`)."""

EIGHT_BIT_AT_ONCE = 1 << 20
"""Elements that AdamW with moments of 8 bits updates at a time (`train/updates/adamw_8bit.py`)."""


@dataclass(frozen=True)
class StateSize:
    """Size of one optimizer state tensor: bytes per element of the weight that it belongs to.

    `matrix`: of weights of two or more dimensions in the layers, `outer`: outside them, `vector`: of one
    dimension. `per_row`, `per_column`: bytes for each row and column of a matrix, anywhere.
    """

    matrix: float
    outer: float
    vector: float
    per_row: float = 0.0
    per_column: float = 0.0

    @classmethod
    def uniform(cls, width: float) -> "StateSize":
        """So many bytes for every element of any weight."""
        return cls(width, width, width)

    def bytes_of(self, sizes: tuple[int, ...], is_layer: bool) -> float:
        """Bytes of the state of a weight of this shape."""
        elements = math.prod(sizes)
        if len(sizes) < 2:
            return elements * self.vector
        lines = elements // sizes[-1] * self.per_row + elements // sizes[-2] * self.per_column
        return elements * (self.matrix if is_layer else self.outer) + lines


@dataclass(frozen=True)
class Load:
    """One rank's share of a plan; `shard_ranks` is the number of ranks that a tensor is sharded over.

    `optimizer_states`: sizes of the tensors that the optimizer keeps per parameter. `scratch_of_largest`:
    fp32 tensors as large as the rank's largest that its step allocates, of `scratch_at_most` elements, if
    that is not None, or as the largest whole one if the step gathers them (`gathers_to_step`).
    `has_scratch`: an optimizer step without weight decay allocates one more tensor of each parameter's size;
    `has_scratch_in_a_step`: the same with the recipe's weight decay. `evaluation`: rows of an evaluation
    micro-batch, None without evaluation. `is_masked`: rows are padded, so that attention is given a mask.
    `attention`: the recipe's `model.attention`. `offload`: the optimizer's state is in host memory;
    `offloads_inputs`: so are the inputs of checkpointed layers. `zero`: DeepSpeed's buffers, of strategies
    zero1 to zero3. `folds`: FSDP2 gets weights in the shape that needs least padding.
    `longest`: tokens of the longest row that the recipe allows, None if that is `sequence_length`.
    `reshard`: FSDP2 frees gathered weights after each forward, each backward, or the last backward of a step;
    `reduces_once`: it reduces gradients in the last micro-batch of a step only.
    """

    shape: ModelShape
    per_device: int
    sequence_length: int
    ranks: int
    nodes: int
    shard_ranks: int
    strategy: str
    precision: str
    optimizer_states: tuple[StateSize, ...]
    has_scratch: bool
    has_scratch_in_a_step: bool
    checkpointing: Checkpointing
    attention: str
    chunked_loss: bool
    has_z_loss: bool = False
    accumulation: int = 1
    evaluation: int | None = None
    is_masked: bool = False
    has_flash: bool = True
    offload: bool = False
    offloads_inputs: bool = False
    zero: ZeroSizes = ZeroSizes()
    folds: bool = True
    scratch_of_largest: int = 0
    scratch_at_most: int | None = None
    gathers_to_step: bool = False
    longest: int | None = None
    reshard: Literal["forward", "backward", "step"] = "forward"
    reduces_once: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of a chunked loss, for the longest rows that the recipe allows."""
        return chunks_of(self.per_device, self.longest or self.sequence_length)

    @property
    def numbers(self) -> Precision:
        """The bytes and dtypes of the precision under this strategy."""
        return find_precision(self.precision, self.strategy)

    @property
    def state_width(self) -> int:
        """Bytes per element of stored weights: 2 for bf16-pure, else 4 (fp32 master weights)."""
        return self.numbers.stored

    @property
    def low(self) -> int | None:
        """Bytes per element of matrix product operands under autocast; None without autocast."""
        return self.numbers.autocast_bytes

    @property
    def frozen_width(self) -> int:
        """Bytes per element of weights that are not trained."""
        return self.numbers.frozen_bytes

    @property
    def forward_width(self) -> int:
        """Bytes per element of weights in the forward; in mixed precision FSDP2 gathers 16-bit copies."""
        return 2 if self.strategy == "fsdp" and self.low else self.numbers.model_bytes

    @property
    def reduced_width(self) -> int:
        """Bytes per element of the gradients that FSDP2 reduces."""
        return 4 if self.low else self.state_width

    def kernel(self, is_masked: bool) -> Kernel:
        """The attention kernel that runs with a mask, or without one."""
        if self.attention == "eager":
            return "eager"
        if self.attention == "flash":
            return "flash"
        return choose_kernel(
            is_narrow=self.numbers.computed < 4,
            is_masked=is_masked,
            # With a mask, transformers repeats the shared key and value heads before the kernel.
            shares_heads=self.shape.kv_width != self.shape.query_width and not is_masked,
            head_dim=self.shape.head_dim,
            value_dim=self.shape.value_dim,
            has_flash=self.has_flash,
        )

    @property
    def layer_kinds(self) -> list["LayerKind"]:
        """Of every layer, whether its attention has a mask, whether it has rotary positions, and its shape.

        flash-attn has windows of its own, without a mask.
        """
        shape = self.shape
        number = shape.layers
        has_mask = shape.window is not None and self.attention != "flash"
        is_long = has_mask and self.sequence_length > (shape.window or 0)
        windowed = shape.windowed or (True,) * number
        rotated = shape.rotated or (shape.structure.rotary != "none",) * number
        segments = [
            place for place, (_, count) in enumerate(shape.layer_shapes) for _ in range(count)
        ]
        frozen = [names for _, names in layers_of(shape)]
        return [
            LayerKind(self.is_masked or (is_long and has_window), has_rotary, segment, names)
            for has_window, has_rotary, segment, names in zip(
                windowed, rotated, segments, frozen, strict=True
            )
        ]

    @property
    def is_zero(self) -> bool:
        """Whether the strategy is one of DeepSpeed's ZeRO stages."""
        return self.strategy.startswith("zero")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are already allocated during a micro-batch's forward."""
        in_buckets = self.strategy == "ddp" and self.ranks > 1
        return (self.accumulation > 1 and not self.accumulates_whole) or in_buckets or self.is_zero

    @property
    def accumulates_whole(self) -> bool:
        """Whether FSDP2's gradients are accumulated before they are reduced."""
        return self.reduces_once and self.accumulation > 1

    @property
    def keeps_weights(self) -> bool:
        """Whether FSDP2's gathered weights outlive a forward."""
        return self.reshard != "forward" and self.shard_ranks > 1

    @property
    def begins_gathered(self) -> bool:
        """Whether FSDP2's weights are gathered before a step's last micro-batch begins."""
        return self.reshard == "step" and self.accumulation > 1 and self.shard_ranks > 1

    @property
    def stays_gathered(self) -> bool:
        """Whether the highest peak is in a micro-batch that reduces and frees no weights: not the last."""
        return self.begins_gathered and not self.reduces_once
