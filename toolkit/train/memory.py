"""What the device really used: peaks since the last step line, and model FLOP utilisation."""

import torch

from toolkit.plan.gpus import find_gpu
from toolkit.plan.model import Plan


def device_peaks() -> dict[str, int] | None:
    """Most bytes allocated, reserved, and used of the device by this process; None without a GPU.

    What lies outside the allocator (context, NCCL, libraries) is what the device reports in use now
    beyond this process's reserved bytes; other processes on the device would count as well.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": reserved,
        "device": reserved + max(0, outside),
    }


class MemoryGauge:
    """Reads the CUDA allocator's counters; on CPU there are none and every value is None."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def read(self) -> dict[str, int | None]:
        """Peak allocated and reserved bytes of this rank since the attempt began."""
        if not self._on_gpu:
            return {"peak_allocated": None, "peak_reserved": None}
        return {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }

    def mfu(self, plan: Plan, seconds: float) -> float | None:
        """Model FLOPs of a step over what all GPUs could do in that time (Chowdhery et al. 2022)."""
        peak = find_gpu(plan.recipe.cluster.gpu).bf16_flops if self._on_gpu else None
        if peak is None or plan.cost.flops_per_step is None:
            return None
        return plan.cost.flops_per_step / (seconds * peak * plan.batch.gpus)
