"""Ranges of allocated, reserved and device bytes, from the estimated live bytes.

Each range is low, expected and high; `basis` states where its factors come from.
"""

from dataclasses import dataclass

from drumline.architectures.gpus import Gpu

_MOVING = (0.97, 1.0, 1.05)
"""Low, expected and high factors on bytes that are not weights, gradients or optimizer state. Against the
trace the closed form is within -1 to +2 % (benchmarks/memory_ranges.py); of published A100 peaks none is
under-estimated by more than 0.1 % (tests/memory/test_published.py). The remaining margin is for workspaces
that kernels allocate internally."""

_ZERO_MOVING = (0.75, 1.0, 1.3)
"""The same under DeepSpeed; wider, because its buffers were read from its source and never traced."""

_RESERVED = {"whole": (1.0, 1.04, 1.41), "sharded": (1.09, 1.27, 1.95)}
"""Reserved / allocated, for bytes that are not weights, gradients or optimizer state: smallest, median and
largest of 48 traced plans, replayed through the allocator model with expandable segments, which workers
enable (benchmarks/memory_ranges.py)."""

_CONTEXT_BYTES = (300e6, 500e6, 700e6)
"""Low, expected and high size of the CUDA context; published figures, not measured by us."""

_NCCL_BYTES = (500e6, 1000e6, 2000e6)
"""Low, expected and high size of NCCL's buffers on one node; published figures. On several nodes the high
one is doubled."""

UNMEASURED = "context and NCCL published; not measured on a GPU yet"


@dataclass(frozen=True)
class ByteRange:
    """Bytes: low, expected, high."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True)
class Totals:
    """Ranges of three totals; `basis` states for each, by name, where its range comes from."""

    allocated: ByteRange
    reserved: ByteRange
    device: ByteRange
    basis: dict[str, str]


def surround(state: int, moving: int, strategy: str, ranks: int, nodes: int, gpu: Gpu) -> Totals:
    """The closed form's totals.

    `state` bytes (weights, gradients, optimizer state) are exact. `moving` bytes are allocated and freed
    within a step; they are uncertain and fragment memory.
    """
    is_zero = strategy.startswith("zero")
    factors = _ZERO_MOVING if is_zero else _MOVING
    allocated = [state + moving * factor for factor in factors]
    source = "DeepSpeed's sources" if is_zero else "48 traced plans and published A100 peaks"
    basis = {
        "allocated": f"closed form: weights, gradients and optimizer state exact, the rest × "
        f"{factors[0]:g} to {factors[2]:g} ({source})"
    }
    if gpu.is_cpu:
        return _on_cpu(allocated, basis)
    ratios = _RESERVED["sharded" if strategy == "fsdp" else "whole"]
    reserved = [
        state + (size - state) * ratio for size, ratio in zip(allocated, ratios, strict=True)
    ]
    basis["reserved"] = (
        f"fragmentation of the rest × {ratios[0]:g} to {ratios[2]:g} (48 replayed traces)"
    )
    return _with_device(allocated, reserved, ranks, nodes, basis)


def surround_replay(allocated: int, reserved: int, expandable: int, ranks: int, nodes: int,
                    gpu: Gpu) -> Totals:  # fmt: skip
    """A trace's totals, from bytes found by replaying it through the allocator model.

    `reserved` is with classic segments, `expandable` with expandable ones.
    """
    sizes = [allocated * factor for factor in _MOVING]
    basis = {
        "allocated": f"traced and replayed, × {_MOVING[0]:g} to {_MOVING[2]:g} for kernels' own"
    }
    if gpu.is_cpu:
        return _on_cpu(sizes, basis)
    held = [expandable * _MOVING[0], float(expandable), max(expandable, reserved) * _MOVING[2]]
    basis["reserved"] = "this trace replayed: expandable segments, at most classic ones"
    return _with_device(sizes, held, ranks, nodes, basis)


def _on_cpu(allocated: list[float], basis: dict[str, str]) -> Totals:
    both = _range(allocated)
    return Totals(both, both, both, basis)


def _with_device(allocated: list[float], reserved: list[float], ranks: int, nodes: int,
                 basis: dict[str, str]) -> Totals:  # fmt: skip
    nccl = _NCCL_BYTES if ranks > 1 else (0, 0, 0)
    device = [
        total + context + network * (2 if nodes > 1 and index == 2 else 1)
        for index, (total, context, network) in enumerate(
            zip(reserved, _CONTEXT_BYTES, nccl, strict=True)
        )
    ]
    basis["device"] = f"reserved + context{' + NCCL' if ranks > 1 else ''}: {UNMEASURED}"
    return Totals(_range(allocated), _range(reserved), _range(device), basis)


def _range(three: list[float]) -> ByteRange:
    return ByteRange(*(int(value) for value in three))
