"""How many GPUs this machine shows, asked of its driver: torch takes seconds to say the same."""

import ctypes
from pathlib import Path

from drumline.errors import LaunchError
from drumline.recipe.schema import Recipe


def check_gpus(recipe: Recipe, wanted: int) -> None:
    """Raise LaunchError where this machine is known to show fewer GPUs than a node of the job needs."""
    if recipe.cluster.gpu == "cpu":
        return
    shown = gpus_here()
    if shown is not None and shown < wanted:
        fix = f"batch.gpus={shown} batch.accumulation=null" if shown else "cluster.gpu=cpu"
        raise LaunchError(
            f"cluster.gpu: the job needs {wanted} × {recipe.cluster.gpu_name} on this machine, which shows "
            f"{shown} GPUs. Nearest: {fix}"
        )


def gpus_here() -> int | None:
    """GPUs that CUDA shows to processes started here; None where another library would have to tell.

    CUDA_VISIBLE_DEVICES counts, as for torch. No context is made, so no memory of a GPU is taken.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None if Path("/dev/kfd").exists() else 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
