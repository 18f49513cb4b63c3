"""Peak bytes of one rank in closed form: no torch, a millisecond, for known families.

What is alive is played on a ledger (`rank.py`), whose sizes are formulas of the model's widths; the
largest moment is the peak. What surrounds it (fragmentation, the CUDA context, NCCL) is a range.
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
    """The estimate: bytes of each part at the peak, the totals with ranges, and the phase.

    `phases` are the bytes allocated at the largest moment of each phase.
    """

    parts: dict[str, int]
    totals: Totals
    phase: str
    phases: dict[str, int]


def estimate(load: Load, gpu: Gpu) -> Peak:
    """The largest moment of a whole attempt: load, forward, backward, optimizer step, evaluation."""
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
