"""Who owns backward and step inside a process, by the launcher that starts it."""

from importlib import import_module

import torch

from toolkit.data.card import Card
from toolkit.errors import LaunchError
from toolkit.plan.model import Plan
from toolkit.train.engines.base import Engine, Piece

ENGINES = {
    "torchrun": ("toolkit.train.engines.torch", "TorchEngine"),
    "accelerate": ("toolkit.train.engines.accelerate", "AccelerateEngine"),
    "deepspeed": ("toolkit.train.engines.deepspeed", "DeepSpeedEngine"),
}

__all__ = ["ENGINES", "Engine", "Piece", "build_engine"]


def build_engine(plan: Plan, card: Card, device: torch.device) -> Engine:
    """The engine of the plan's launcher; LaunchError where its library is not installed."""
    module, name = ENGINES[plan.recipe.launch.launcher]
    try:
        engine_class = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise LaunchError(
            f"launch.launcher: {plan.recipe.launch.launcher} needs {error.name}, which is not "
            f"installed. Nearest: pip install 'drumline[{plan.recipe.launch.launcher}]'"
        ) from None
    engine: Engine = engine_class(plan, card, device)
    return engine
