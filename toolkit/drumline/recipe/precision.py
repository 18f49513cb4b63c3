"""Bytes and dtypes of each `precision`; plan, memory estimate and engines all read this table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bytes per number. `stored`: of weights, gradients and optimizer state as the optimizer keeps them.

    `autocast`: torch's name of the dtype of matrix products under autocast; None without autocast.
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
