"""Builds torch's optimizers; weight decay acts on tensors of two or more dimensions only.

The state of each optimizer and the kernels and strategies it supports are in `plan/optimizers.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Optimizer, Recipe

Groups = list[dict[str, Any]]
Builder = Callable[[Groups, Optimizer, dict[str, Any]], torch.optim.Optimizer]

RATE_RATIO = "rate_ratio"
"""Key of a parameter group: its learning rate divided by the schedule's; 1 if absent."""


def _adam(kind: type[torch.optim.Optimizer]) -> Builder:
    def build(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
        return kind(groups, lr=spec.lr, betas=tuple(spec.betas), eps=spec.eps, **kernel)  # type: ignore[call-arg]

    return build


def _sgd(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, **kernel
    )


BUILDERS: dict[str, Builder] = {
    "adamw": _adam(torch.optim.AdamW),
    "adam": _adam(torch.optim.Adam),
    "sgd": _sgd,
}


def build_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters.

    Two groups: tensors of two or more dimensions with weight decay, the others without; one group without
    weight decay. The `custom` optimizer is built by a function of the recipe's project.
    """
    spec = recipe.optimizer
    groups = _groups([p for p in module.parameters() if p.requires_grad], spec.weight_decay)
    if spec.factory is None:
        kernel: dict[str, Any] = {spec.implementation: True} if spec.implementation else {}
        return BUILDERS[spec.name](groups, spec, kernel)
    made: Any = load_factory(spec.factory, recipe.project)(groups, lr=spec.lr, **spec.options)
    if not isinstance(made, torch.optim.Optimizer):
        raise PlanError(
            f"optimizer.factory: {spec.factory} made a {type(made).__name__}, not a torch optimizer"
        )
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's learning rate to the schedule's rate times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_RATIO, 1.0)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> Groups:
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    matrices = [p for p in parameters if _ndim(p) >= 2]
    vectors = [p for p in parameters if _ndim(p) < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _ndim(parameter: Any) -> int:
    """Dimensions of the whole tensor, also for a parameter that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
