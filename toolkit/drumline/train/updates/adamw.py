"""AdamW (Loshchilov and Hutter 2019) of a single parameter, for optimizers that mix it with another rule."""

from typing import Any

import torch
from torch import Tensor


def adamw_update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One update in place; state: `step`, float32 [] on the CPU, `exp_avg`, `exp_avg_sq`."""
    gradient = parameter.grad
    assert gradient is not None
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    state["step"] += 1
    first, second = group["betas"]
    average: Tensor = state["exp_avg"]
    square: Tensor = state["exp_avg_sq"]
    average.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    apply_adamw(parameter, average, square, state["step"], group)


def apply_adamw(
    parameter: Tensor, average: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """Decay the parameter, and take the step of these moments, all of its shape; `step`: [] on the CPU."""
    first, second = group["betas"]
    root = square.sqrt().div_((1 - second**step).sqrt()).add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_((average / root).mul_(group["lr"] / (1 - first**step)))
