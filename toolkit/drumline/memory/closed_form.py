"""Peak memory of one rank, computed without torch in about a millisecond, for known model families.

An attempt is simulated on a ledger (`rank.py`) of live tensors, whose sizes follow from the model's
widths; the largest total is the peak. Fragmentation, the CUDA context and NCCL are added as ranges.
"""

from dataclasses import dataclass

from drumline.architectures.gpus import Gpu
from drumline.memory.load import Load
from drumline.memory.ranges import ByteRange, Totals, surround
from drumline.memory.rank import play

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


def estimate(load: Load, gpu: Gpu) -> Peak:
    """Peak memory over a whole attempt: load, forward, backward, optimizer step, evaluation."""
    ledger = play(load)
    parts = {name: ledger.peak_parts.get(name, 0) for name in PARTS}
    parts["workspace"] = gpu.workspace_bytes
    phases = {name: size + gpu.workspace_bytes for name, size in ledger.phase_peaks.items()}
    state = sum(parts[name] for name in STATES)
    totals = surround(
        state, sum(parts.values()) - state, load.strategy, load.ranks, load.nodes, gpu
    )
    return Peak(parts, totals, ledger.peak_phase, phases)


__all__ = ["ByteRange", "Peak", "estimate"]
