"""Lion (Chen et al. 2023): the sign of an interpolated gradient, with decoupled weight decay."""

from typing import Any

import torch
from torch import Tensor

from drumline.train.updates.by_parameter import ByParameter


class Lion(ByParameter):
    """State: `exp_avg`, of the parameter's shape. Works element by element, so on any shard."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move every element by the rate, in the direction of its interpolated gradient."""
        first, second = group["betas"]
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        average: Tensor = state["exp_avg"]
        direction = average.lerp(gradient, 1 - first).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])
        average.lerp_(gradient, 1 - second)
