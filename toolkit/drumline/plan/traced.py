"""Memory of a plan from a recording of its training step, for `drumline plan --trace`. Pure."""

from drumline.architectures.gpus import Gpu
from drumline.memory.closed_form import PARTS, STATES, Peak
from drumline.memory.ranges import totals
from drumline.memory.recording import Recording
from drumline.plan.footprint import device_of, facts
from drumline.plan.model import MemoryFacts, Plan


def traced_facts(recording: Recording, plan: Plan, gpu: Gpu) -> MemoryFacts:
    """MemoryFacts of a trace, whose allocations are replayed through the allocator model."""
    peak = recording.peak()
    parts = dict.fromkeys(PARTS, 0)
    for number, size in peak.alive.items():
        parts[recording.part_of(number)] += size
    state = sum(parts[name] for name in STATES)
    device = device_of(gpu, plan.memory.capacity, plan.mesh)
    moving = peak.bytes - state
    found = totals(state, moving, lambda: recording.events, device, "traced", is_zero=False)
    parts["workspace"] = device.workspace
    phases = {name: size + device.workspace for name, size in recording.peaks_by_phase().items()}
    return facts(
        Peak(parts, found, peak.phase, phases),
        plan.memory.capacity,
        "traced",
        plan.memory.host_bytes,
    )
