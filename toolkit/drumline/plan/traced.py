"""Memory of a plan from a recording of its training step, for `drumline plan --trace`. Pure."""

from drumline.architectures.gpus import Gpu
from drumline.memory.allocator import CachingAllocator
from drumline.memory.closed_form import PARTS, Peak
from drumline.memory.ranges import surround_replay
from drumline.memory.recording import Recording
from drumline.plan.footprint import facts
from drumline.plan.model import MemoryFacts, Plan


def traced_facts(recording: Recording, plan: Plan, gpu: Gpu) -> MemoryFacts:
    """MemoryFacts of a trace, replayed through the allocator model with expandable and classic segments."""
    expandable, classic = CachingAllocator(expandable=True), CachingAllocator()
    expandable.replay(recording.events)
    classic.replay(recording.events)
    peak = recording.peak()
    parts = dict.fromkeys(PARTS, 0)
    for number, size in peak.alive.items():
        parts[recording.part_of(number)] += size
    workspace = gpu.workspace_bytes
    parts["workspace"] = workspace
    totals = surround_replay(
        peak.bytes + workspace,
        classic.peak_reserved + workspace,
        expandable.peak_reserved + workspace,
        plan.batch.gpus,
        plan.batch.nodes,
        gpu,
    )
    phases = {name: size + workspace for name, size in recording.peaks_by_phase().items()}
    return facts(
        Peak(parts, totals, peak.phase, phases),
        plan.memory.capacity,
        "traced",
        plan.memory.host_bytes,
    )
