"""Bytes and dtypes of each `precision`; plan, memory estimate and engines all read this table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bytes per number, and dtypes by torch's names.

    `stored`: bytes of weights and optimizer state as the optimizer keeps them and checkpoints hold them.
    `autocast`: the dtype of matrix products under autocast; None without autocast. `model`: the dtype of the
    weights that forward and backward use, with gradients like them.
    """

    stored: int
    autocast: str | None = None
    model: str = "float32"

    @property
    def frozen(self) -> str:
        """The dtype of weights that are not trained, which need no more than a matrix product takes."""
        return self.autocast or self.model

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a number in weights that are not trained."""
        return self.computed

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps fp32 weights beside the model's 16-bit ones."""
        return self.stored > self.model_bytes

    @property
    def model_bytes(self) -> int:
        """Bytes of a number in the model's weights."""
        return 4 if self.model == "float32" else 2

    @property
    def autocast_bytes(self) -> int | None:
        """Bytes of a matrix product's operands under autocast."""
        return 2 if self.autocast else None

    @property
    def computed(self) -> int:
        """Bytes of a matrix product's operands, with autocast or without."""
        return self.autocast_bytes or self.model_bytes


_PRECISIONS = {
    "fp32": Precision(stored=4),
    "bf16": Precision(stored=4, autocast="bfloat16"),
    "fp16": Precision(stored=4, autocast="float16"),
    "bf16-pure": Precision(stored=2, model="bfloat16"),
}
_ZERO_PRECISIONS = {"bf16": Precision(stored=4, model="bfloat16")}
"""What differs under DeepSpeed's ZeRO: its own bf16 has 16-bit weights and partitioned fp32 masters."""


def find_precision(name: str, strategy: str) -> Precision:
    """The bytes and dtypes of a recipe's `precision` under its `strategy.name`."""
    if strategy.startswith("zero") and name in _ZERO_PRECISIONS:
        return _ZERO_PRECISIONS[name]
    return _PRECISIONS[name]
