"""Memory of a plan from a trace of its training step, for `drumline plan --trace`. Pure."""

from drumline.architectures.gpus import Gpu
from drumline.memory.closed_form import PARTS, STATES, Peak
from drumline.memory.ranges import totals
from drumline.memory.recording import Traced
from drumline.plan.footprint import device_of, facts
from drumline.plan.model import MemoryFacts, Plan


def traced_facts(traced: Traced, plan: Plan, gpu: Gpu) -> MemoryFacts:
    """MemoryFacts of a trace, whose allocations are replayed through the allocator model."""
    parts = {name: traced.parts.get(name, 0) for name in PARTS}
    state = sum(parts[name] for name in STATES)
    device = device_of(gpu, plan.memory.capacity, plan.mesh)
    moving = traced.peak - state
    found = totals(state, moving, lambda: traced.events, device, "traced", is_zero=False)
    parts["workspace"] = device.workspace
    phases = {name: size + device.workspace for name, size in traced.phases.items()}
    return facts(
        Peak(parts, found, traced.phase, phases),
        plan.memory.capacity,
        "traced",
        plan.memory.host_bytes,
    )
