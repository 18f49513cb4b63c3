"""Engines run backward and the optimizer step; the plan's launcher selects one."""

from importlib import import_module

import torch
import torch.distributed as dist

from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import LaunchError
from drumline.plan.model import Plan
from drumline.train.engines.base import Engine
from drumline.train.models.builder import Progress, ignore_progress
from drumline.train.tensor_shard import TensorShard

ENGINES = {
    "torchrun": ("drumline.train.engines.torch", "TorchEngine"),
    "accelerate": ("drumline.train.engines.accelerate", "AccelerateEngine"),
    "deepspeed": ("drumline.train.engines.deepspeed", "DeepSpeedEngine"),
}

__all__ = ["ENGINES", "Engine", "TensorShard", "build_engine"]


def build_engine(
    plan: Plan,
    manifest: DatasetManifest,
    device: torch.device,
    progress: Progress = ignore_progress,
) -> Engine:
    """Build the engine of the plan's launcher; rank 0 prints what building the model found.

    LaunchError where the launcher's library is not installed.
    """
    module, name = ENGINES[plan.recipe.launch.launcher]
    try:
        engine_class = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise LaunchError(
            f"launch.launcher: {plan.recipe.launch.launcher} needs {error.name}, which is not "
            f"installed. Nearest: pip install 'drumline[{plan.recipe.launch.launcher}]'"
        ) from None
    engine: Engine = engine_class(plan, manifest, device, progress=progress)
    if why := engine.module.objective.why_not_additive:
        engine.notes.append(f"another split would change the training: {why}")
    for note in engine.notes if dist.get_rank() == 0 else []:
        print(note, flush=True)
    return engine
