"""Peak memory of one rank, computed without torch in some milliseconds, for known model families.

An attempt is simulated on a ledger (`rank.py`) of live tensors, whose sizes follow from the model's
widths; the largest total is the peak. All its allocations are then replayed through the allocator model.
"""

from dataclasses import dataclass
from functools import cache

from drumline.memory.load import Load
from drumline.memory.ranges import ByteRange, Device, Totals, totals
from drumline.memory.rank import events, play

PARTS = ("parameters", "gradients", "optimizer", "activations", "loss", "communication")
STATES = PARTS[:3]


@dataclass(frozen=True)
class Peak:
    """The estimate: bytes of each part at the peak, the totals with ranges, and the phase of the peak.

    `phases` gives the peak of allocated bytes in each phase.
    """

    parts: dict[str, int]
    totals: Totals
    phase: str
    phases: dict[str, int]


@cache
def estimate(load: Load, device: Device) -> Peak:
    """Peak memory over a whole attempt: load, forward, backward, optimizer step, evaluation.

    Cached, because advice and the search for a split repeat loads.
    """
    ledger = play(load)
    parts = {name: ledger.peak_parts.get(name, 0) for name in PARTS}
    state = sum(parts[name] for name in STATES)
    found = totals(
        state,
        sum(parts.values()) - state,
        lambda: events(load),
        device,
        "closed form from DeepSpeed's sources" if load.is_zero else "closed form",
        load.is_zero,
    )
    parts["workspace"] = device.workspace
    phases = {name: size + device.workspace for name, size in ledger.phase_peaks.items()}
    return Peak(parts, found, ledger.peak_phase, phases)


__all__ = ["ByteRange", "Peak", "estimate"]
