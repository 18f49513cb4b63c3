"""Ranges of allocated, reserved and device bytes: low, expected and high.

Allocated bytes are a peak of live bytes. Reserved bytes come from replaying all allocations through the
allocator model with the device's capacity as its limit. `basis` states where each range comes from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from drumline.architectures.gpus import PUBLISHED_CONTEXT_BYTES
from drumline.memory.allocator import (
    SMALL_REQUEST,
    SMALL_SEGMENT,
    CachingAllocator,
    DeviceFull,
)
from drumline.memory.events import FREE, Event

Verdict = Literal["fits", "tight", "does_not_fit", "unknown"]

_MOVING = (0.97, 1.0, 1.05)
"""Low, expected and high factors on bytes that are not weights, gradients or optimizer state. Against the
trace the closed form is within -1 to 0 % (benchmarks/memory_ranges.py); of published A100 peaks none is
under-estimated by more than 0.1 % (tests/memory/test_published.py). The remaining margin is for workspaces
that kernels allocate internally."""

_ZERO_MOVING = (0.95, 1.0, 1.1)
"""The same under DeepSpeed; wider, because its live tensors were compared on CPU only, with 2 and 4 ranks
(tests/distributed/test_zero_memory.py), where nothing overlaps."""

_CONTEXT_RANGE = (-200e6, 0.0, 200e6)
"""Low, expected and high size of the CUDA context with what it has loaded, less that of the card's
table: the range of the published ones."""

_NCCL_BYTES = (500e6, 1000e6, 2000e6)
"""Low, expected and high size of NCCL's buffers on one node; published figures. On several nodes the high
one is doubled."""

OUTSIDE = "context measured on an H100, else published; NCCL published"


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

    def verdict(self, capacity: int | None) -> Verdict:
        """Whether the device's bytes are within its capacity: `tight` if only the expected ones are."""
        if capacity is None:
            return "unknown"
        if self.device.expected > capacity:
            return "does_not_fit"
        return "fits" if self.device.high <= capacity else "tight"


@dataclass(frozen=True)
class Device:
    """What a rank's allocations share: the capacity in bytes (None if not known), ranks and nodes.

    `workspace`: bytes of cuBLAS' workspaces. `is_cpu`: no CUDA, so all three totals are the allocated bytes.
    `context`: bytes of the CUDA context.
    Of runs that logged their peaks (`calibration.py`), each low, expected, high: `measured_outside`, bytes
    beyond the reserved ones, and `held`, reserved bytes over those of a replay, which lower its limit.
    """

    capacity: int | None
    workspace: int
    ranks: int = 1
    nodes: int = 1
    is_cpu: bool = False
    context: float = PUBLISHED_CONTEXT_BYTES
    measured_outside: tuple[float, float, float] | None = None
    held: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def outside(self) -> tuple[float, float, float]:
        """Bytes that the CUDA context and NCCL take: low, expected, high."""
        if self.measured_outside:
            return self.measured_outside
        times = (0, 0, 0) if self.ranks == 1 else (1, 1, 2 if self.nodes > 1 else 1)
        low, expected, high = (
            self.context + more + nccl * n
            for more, nccl, n in zip(_CONTEXT_RANGE, _NCCL_BYTES, times, strict=True)
        )
        return low, expected, high


def totals(
    state: int,
    moving: int,
    events: Callable[[], Sequence[Event]],
    device: Device,
    source: str,
    is_zero: bool,
) -> Totals:
    """The totals of one rank's attempt.

    `state` bytes (weights, gradients, optimizer state) at the peak are exact. `moving` bytes are allocated
    and freed within a step, and uncertain. `events` returns every allocation of the attempt. `source`: what
    the bytes come from, for the basis.
    """
    factors = _ZERO_MOVING if is_zero else _MOVING
    moving += device.workspace
    low, expected, high = (int(state + moving * factor) for factor in factors)
    allocated = ByteRange(low, expected, high)
    basis = {
        "allocated": f"{source}: weights, gradients and optimizer state exact, the rest × "
        f"{factors[0]:g} to {factors[2]:g}"
    }
    if device.is_cpu:
        return Totals(allocated, allocated, allocated, basis)
    network = " + NCCL" if device.ranks > 1 else ""
    basis["device"] = f"reserved + context{network}: {OUTSIDE}"
    outside = device.outside()
    if device.capacity is not None and expected * device.held[1] + outside[1] > device.capacity:
        basis["reserved"] = "at least the allocated bytes, which the device does not hold"
        three = zip((low, expected, high), outside, strict=True)
        taken = ByteRange(*(int(size + more) for size, more in three))
        return Totals(allocated, allocated, taken, basis)
    basis["reserved"] = "the step's allocations replayed: expandable segments, at most classic ones"
    return _replayed(allocated, _without_small(events(), device.workspace), device, basis)


def _replayed(
    allocated: ByteRange, events: Sequence[Event], device: Device, basis: dict[str, str]
) -> Totals:
    """The totals with reserved and device bytes from replays.

    At its limit the allocator releases what is free, so more than the limit is only reported if the replay
    fails; then, without a limit. The high end replays with the slack of the allocated bytes taken from the
    limit. If that works, it is what classic segments would hold, up to the limit.
    """
    slack = allocated.high - allocated.expected
    less, outside, more = device.outside()
    free = _reserved(events, is_expandable=True)
    capacity = device.capacity or int(free + slack + more)
    likely = int((capacity - outside) / device.held[1])
    room = int((capacity - more) / device.held[2])
    expected = _within(events, free, likely)
    high = _within(events, free, room - slack) + slack
    if high <= room:
        high = max(high, min(_reserved(events, is_expandable=False) + slack, room))
    elif expected <= likely:
        high = _lowest(events, room - slack, free) + slack
    high = max(high, expected)
    top = max(high + more, expected + outside)
    low = max(allocated.low, expected - (allocated.expected - allocated.low))
    reserved = ByteRange(min(low, expected), expected, high)
    if high <= room:
        top = min(top, capacity)
    return Totals(
        allocated,
        reserved,
        ByteRange(int(reserved.low + less), int(expected + outside), int(top)),
        basis,
    )


def _without_small(events: Sequence[Event], workspace: int) -> list[Event]:
    """The events with one block, alive from the beginning, for cuBLAS' workspace and all small requests.

    Small requests share segments of 2 MiB, so that what they reserve is close to the peak of their bytes.
    """
    large: list[Event] = []
    small: dict[int, int] = {}
    total = most = 0
    for event in events:
        number, size, _ = event
        if size == FREE:
            if number in small:
                total -= small.pop(number)
                continue
        elif size <= SMALL_REQUEST:
            small[number] = size
            total += size
            most = max(most, total)
            continue
        large.append(event)
    always = -(-most // SMALL_SEGMENT) * SMALL_SEGMENT + workspace
    return [(-1, always, 0), *large] if always else large


def _reserved(events: Sequence[Event], is_expandable: bool, limit: int | None = None) -> int:
    """Peak of the reserved bytes of a replay; DeviceFull if the limit is exceeded."""
    allocator = CachingAllocator(is_expandable, limit)
    allocator.replay(events)
    return allocator.peak_reserved


def _lowest(events: Sequence[Event], low: int, high: int) -> int:
    """The lowest limit that a replay stays within, to 1 %; `low` is one that it exceeds, `high` is not."""
    while high - low > high // 100:
        middle = (low + high) // 2
        try:
            _reserved(events, is_expandable=True, limit=middle)
        except DeviceFull:
            low = middle
        else:
            high = middle
    return high


def _within(events: Sequence[Event], free: int, limit: int) -> int:
    """Reserved bytes with this limit, or `free`, those without one, if the limit is too low."""
    if free <= limit:
        return free
    try:
        return _reserved(events, is_expandable=True, limit=limit)
    except DeviceFull:
        return free
