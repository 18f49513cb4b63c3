"""From the bytes that are alive to what the device must hold: allocated, reserved, used.

Each is low, expected and high, and `basis` says what the three rest on.
"""

from dataclasses import dataclass

from toolkit.plan.gpus import Gpu

_MOVING = (0.94, 1.0, 1.06)
"""Of what is not weights, gradients or optimizer state: kernels that allocate inside themselves."""

BASIS = (
    "closed form; weights, gradients and optimizer state exact, the rest 0.94 to 1.06 × the expected "
    "value; reserved and device ranges are margins, not measured on a GPU yet"
)

_RESERVED = {"whole": (1.01, 1.06, 1.20), "sharded": (1.05, 1.25, 1.50)}
_CONTEXT_BYTES = (300e6, 500e6, 700e6)
_NCCL_BYTES = (500e6, 1000e6, 2000e6)


@dataclass(frozen=True)
class ByteRange:
    """Bytes: low, expected, high."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True)
class Totals:
    """Three totals, and in words what their ranges rest on."""

    allocated: ByteRange
    reserved: ByteRange
    device: ByteRange
    basis: str


def surround(state: int, moving: int, strategy: str, ranks: int, nodes: int, gpu: Gpu) -> Totals:
    """`state` bytes are exact; `moving` ones come and go and leave gaps between them."""
    allocated = [state + moving * factor for factor in _MOVING]
    if gpu.is_cpu:
        both = _range(allocated)
        return Totals(both, both, both, BASIS)
    ratios = _RESERVED["sharded" if strategy in ("fsdp", "zero3") else "whole"]
    reserved = [
        state + (size - state) * ratio for size, ratio in zip(allocated, ratios, strict=True)
    ]
    nccl = _NCCL_BYTES if ranks > 1 else (0, 0, 0)
    device = [
        total + context + network * (2 if nodes > 1 and index == 2 else 1)
        for index, (total, context, network) in enumerate(
            zip(reserved, _CONTEXT_BYTES, nccl, strict=True)
        )
    ]
    return Totals(_range(allocated), _range(reserved), _range(device), BASIS)


def _range(three: list[float]) -> ByteRange:
    return ByteRange(*(int(value) for value in three))
