"""The input of the memory estimate: everything that one rank's peak depends on. Pure."""

from dataclasses import dataclass

from drumline.architectures.shapes import ModelShape
from drumline.memory.attention import Kernel, choose_kernel
from drumline.recipe.precision import PRECISIONS

CHUNK_TOKENS = 1024
"""Tokens whose logits are alive at once with a chunked loss (`train/objectives/cross_entropy.py`)."""


@dataclass(frozen=True)
class Load:
    """One rank's share of a plan; `shard_ranks` is the number of ranks that a tensor is sharded over.

    `optimizer_states`: tensors of the parameter's size that the optimizer keeps per parameter.
    `has_scratch`: an optimizer step without weight decay allocates one more such tensor for a moment;
    `has_scratch_in_a_step`: the same with the recipe's weight decay. `evaluation`: rows of an evaluation
    micro-batch, None without evaluation. `is_masked`: attention is given a mask. `attention`: the recipe's
    `model.attention`.
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
        """Bytes per element of stored weights: 2 for bf16-pure, else 4 (fp32 master weights)."""
        return PRECISIONS[self.precision].stored

    @property
    def low(self) -> int | None:
        """Bytes per element of matrix product operands under autocast; None without autocast."""
        return PRECISIONS[self.precision].autocast_bytes

    @property
    def forward_width(self) -> int:
        """Bytes per element of weights in the forward; in mixed precision FSDP2 gathers 16-bit copies."""
        return 2 if self.strategy == "fsdp" and self.low else self.state_width

    @property
    def kernel(self) -> Kernel:
        """The attention kernel that runs."""
        if self.attention == "eager":
            return "eager"
        if self.attention == "flash":
            return "flash"
        return choose_kernel(
            is_narrow=PRECISIONS[self.precision].computed < 4,
            is_masked=self.is_masked,
            # With a mask, transformers repeats the shared key and value heads before the kernel.
            shares_heads=self.shape.kv_width != self.shape.query_width and not self.is_masked,
            head_dim=self.shape.head_dim,
            has_flash=self.has_flash,
        )

    @property
    def is_zero(self) -> bool:
        """Whether the strategy is one of DeepSpeed's ZeRO stages."""
        return self.strategy.startswith("zero")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are already allocated during a micro-batch's forward."""
        in_buckets = self.strategy == "ddp" and self.ranks > 1
        return self.accumulation > 1 or in_buckets or self.is_zero
