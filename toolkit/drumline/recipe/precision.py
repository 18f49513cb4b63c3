"""What each `precision` of a recipe means in bytes: the one table that plan, memory and engines read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bytes of a number. `stored`: of weights, gradients and optimizer state as the optimizer holds them.

    `autocast` is the dtype of matrix products under autocast, by torch's name; None where there is none.
    """

    stored: int
    autocast: str | None = None

    @property
    def autocast_bytes(self) -> int | None:
        """Bytes of a matrix product's operands under autocast."""
        return 2 if self.autocast else None

    @property
    def computed(self) -> int:
        """Bytes of a matrix product's operands, with autocast or without."""
        return self.autocast_bytes or self.stored


PRECISIONS = {
    "fp32": Precision(stored=4),
    "bf16": Precision(stored=4, autocast="bfloat16"),
    "fp16": Precision(stored=4, autocast="float16"),
    "bf16-pure": Precision(stored=2),
}
