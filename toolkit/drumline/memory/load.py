"""What one rank is asked to hold, and the widths that follow from it. Pure."""

from dataclasses import dataclass

from drumline.architectures.shapes import ModelShape
from drumline.memory.attention import Kernel, choose_kernel
from drumline.recipe.precision import PRECISIONS

CHUNK_TOKENS = 1024
"""Tokens whose logits are alive at once when the loss is chunked (`train/loss.py`)."""


@dataclass(frozen=True)
class Load:
    """One rank's share of a plan; `shard_ranks` is how many ranks share a sharded tensor.

    `optimizer_states` are the tensors that the optimizer keeps for a parameter, each of its size;
    `has_scratch` says that its step allocates one more, without weight decay, `has_scratch_in_a_step` with
    the recipe's. `evaluation` is the rows of an evaluation's micro-batch, None without one; `is_masked` says
    that rows are padded, so that attention gets a mask; `attention` is the recipe's word.
    """

    shape: ModelShape
    per_device: int
    sequence_length: int
    ranks: int
    nodes: int
    shard_ranks: int
    strategy: str
    precision: str
    optimizer_states: int
    has_scratch: bool
    has_scratch_in_a_step: bool
    checkpointing: bool
    attention: str
    chunked_loss: bool
    accumulation: int = 1
    evaluation: int | None = None
    is_masked: bool = False
    has_flash: bool = True
    offload: bool = False

    @property
    def state_width(self) -> int:
        """Bytes of a stored weight: 2 in bf16-pure, else 4 (the fp32 master)."""
        return PRECISIONS[self.precision].stored

    @property
    def low(self) -> int | None:
        """Bytes of a matrix product's operands under autocast; None without it."""
        return PRECISIONS[self.precision].autocast_bytes

    @property
    def forward_width(self) -> int:
        """Bytes of a weight as the forward sees it: FSDP2 gathers a narrow copy in mixed precision."""
        return 2 if self.strategy == "fsdp" and self.low else self.state_width

    @property
    def kernel(self) -> Kernel:
        """Which attention runs."""
        if self.attention == "eager":
            return "eager"
        if self.attention == "flash":
            return "flash"
        return choose_kernel(
            is_narrow=PRECISIONS[self.precision].computed < 4,
            is_masked=self.is_masked,
            # With a mask transformers writes shared heads out first.
            shares_heads=self.shape.kv_width != self.shape.query_width and not self.is_masked,
            head_dim=self.shape.head_dim,
            has_flash=self.has_flash,
        )

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed lays the states out."""
        return self.strategy.startswith("zero")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there already while a micro-batch runs forward."""
        in_buckets = self.strategy == "ddp" and self.ranks > 1
        return self.accumulation > 1 or in_buckets or self.is_zero
