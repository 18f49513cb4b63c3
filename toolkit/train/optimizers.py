"""Optimizers by name; weight decay acts on tensors of two or more dimensions only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.recipe.schema import Optimizer


def _adam(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    def build(groups: Any, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
        return kind(groups, lr=spec.lr, betas=tuple(spec.betas), eps=spec.eps, **kernel)  # type: ignore[call-arg]

    return build


def _sgd(groups: Any, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, **kernel
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adam(torch.optim.AdamW),
    "adam": _adam(torch.optim.Adam),
    "sgd": _sgd,
}


def build_optimizer(module: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """The optimizer over decayed matrices and undecayed vectors; one group where nothing decays."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if spec.weight_decay == 0:
        one = [{"params": parameters, "weight_decay": 0.0}]
        return OPTIMIZERS[spec.name](one, spec, {spec.implementation: True})
    groups = [
        {"params": [p for p in parameters if _ndim(p) >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if _ndim(p) < 2], "weight_decay": 0.0},
    ]
    kernel = {spec.implementation: True}
    return OPTIMIZERS[spec.name]([group for group in groups if group["params"]], spec, kernel)


def _ndim(parameter: Any) -> int:
    """Dimensions of the whole tensor, also where ZeRO-3 keeps a flat part of it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
