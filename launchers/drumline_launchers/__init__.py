"""Launchers: pure functions from a Plan to the command that starts its ranks. Never imports torch."""

from drumline_launchers import accelerate, deepspeed, torchrun
from drumline_launchers.base import Command, Renderer

LAUNCHERS: dict[str, Renderer] = {
    "torchrun": torchrun.render,
    "accelerate": accelerate.render,
    "deepspeed": deepspeed.render,
}

__all__ = ["LAUNCHERS", "Command", "Renderer"]
