"""Muon (Jordan et al. 2024): orthogonalised momentum for matrices in the layers, AdamW for all else.

The Newton-Schulz iteration runs in fp32 on the whole matrix, gathered where it is sharded: in bf16, or on a
shard, the result would depend on the split. A matrix's rate is scaled by 0.2·√(longer side) (Liu et al.
2025), so that the rate and weight decay of AdamW suit it, too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from drumline.train.updates.adamw import adamw_update
from drumline.train.updates.by_parameter import ByParameter

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2
"""Root mean square of AdamW's usual update."""


class Muon(ByParameter):
    """Groups with `is_matrix` are orthogonalised: state `momentum_buffer`. Others have the states of AdamW.

    A tensor of more dimensions is a batch of matrices, such as the experts of a layer.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": 0.0,
            "is_matrix": False,
        }
        super().__init__(params, defaults)

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix of the layers by Muon's rule, any other tensor as AdamW does."""
        if group["is_matrix"]:
            self._update_matrix(parameter, gradient, group)
        else:
            adamw_update(parameter, self.state[parameter], group)

    def _update_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalised(gradient.lerp(average, group["momentum"]))
        scale = _RMS * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalised(update: Tensor) -> Tensor:
    """The matrix [..., m, n] with its singular values near 1, fp32; a shard of it where `update` is one."""
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    x = whole.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = x.mT if is_tall else x
    if isinstance(update, DTensor):
        return distribute_tensor(x, update.device_mesh, update.placements, src_data_rank=None)
    return x
