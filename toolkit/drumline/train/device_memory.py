"""Facts about a rank's device: its name, measured peak memory, and model FLOP utilisation."""

import socket
from typing import Any

import torch

from drumline.architectures.gpus import find_gpu
from drumline.plan.model import Plan


def device_peaks() -> dict[str, int] | None:
    """Peak bytes allocated, reserved, and used on the device by this process; None without a GPU.

    Memory outside the allocator (context, NCCL, libraries) is what the device reports in use now
    beyond this process's reserved bytes; other processes on the device would be counted too.
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


def device_facts(device: torch.device) -> dict[str, Any]:
    """Host and device of this rank, and library versions; None for CUDA libraries without a GPU."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "nccl": None,
        "cudnn": None,
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


class MemoryGauge:
    """Reads the CUDA caching allocator's counters; on CPU every value is None."""

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
        """Model FLOPs of a step / peak bf16 FLOPs of all GPUs in that time (Chowdhery et al. 2022)."""
        peak = find_gpu(plan.recipe.cluster.gpu).narrow_flops if self._on_gpu else None
        if peak is None or plan.cost.flops_per_step is None:
            return None
        return plan.cost.flops_per_step / (seconds * peak * plan.batch.gpus)
