"""Builds the optimizers and their parameter groups.

The state of each optimizer and the kernels and strategies it supports are in `plan/optimizers.py`.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from drumline.architectures.patterns import matching
from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Optimizer, ParameterGroup, Recipe
from drumline.train.models.blocks import named_blocks
from drumline.train.models.folding import original_name
from drumline.train.updates.adamw_8bit import AdamW8bit
from drumline.train.updates.lion import Lion
from drumline.train.updates.muon import Muon

Groups = list[dict[str, Any]]
Builder = Callable[[Groups, Optimizer, dict[str, Any]], torch.optim.Optimizer]

RATE_RATIO = "rate_ratio"
"""Key of a parameter group: its learning rate divided by the schedule's; 1 if absent."""
IS_MATRIX = "is_matrix"
"""Key of a parameter group: whether its tensors are matrices of the model's layers, or batches of them."""


def _adam(kind: type[torch.optim.Optimizer]) -> Builder:
    def build(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
        return kind(groups, lr=spec.lr, betas=tuple(spec.betas), eps=spec.eps, **kernel)  # type: ignore[call-arg]

    return build


def _sgd(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, **kernel
    )


def _adafactor(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=spec.lr)


def _lion(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return Lion(groups, spec.lr, (spec.betas[0], spec.betas[1]))


def _muon(groups: Groups, spec: Optimizer, kernel: dict[str, Any]) -> torch.optim.Optimizer:
    return Muon(groups, spec.lr, spec.momentum, (spec.betas[0], spec.betas[1]), spec.eps)


BUILDERS: dict[str, Builder] = {
    "adamw": _adam(torch.optim.AdamW),
    "adam": _adam(torch.optim.Adam),
    "adamw_8bit": _adam(AdamW8bit),
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def build_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters of a model and its objective.

    The `custom` optimizer is built by a function of the recipe's project. PlanError where a name of
    `optimizer.groups` matches no parameter.
    """
    spec = recipe.optimizer
    groups = _groups(module, spec)
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


def _groups(module: nn.Module, spec: Optimizer) -> Groups:
    """Groups of parameters with the same weight decay, rate ratio and, for Muon, kind of tensor.

    Weight decay is on tensors of two or more dimensions, unless `optimizer.groups` says otherwise; the first
    of them that matches a parameter's name holds for it.
    """
    named = {
        original_name(name.removeprefix("model.")): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    chosen: dict[str, ParameterGroup] = {}
    for place, rule in enumerate(spec.groups):
        for name in matching([rule.match], set(named), f"optimizer.groups.{place}.match"):
            chosen.setdefault(name, rule)
    model = getattr(module, "model", module)
    inside = tuple(f"{name}." for name, _ in named_blocks(model)) if spec.name == "muon" else ()
    found: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    depths = _depths(set(named)) if spec.layer_decay != 1.0 else {}
    for name, parameter in named.items():
        own = chosen.get(name)
        decay = spec.weight_decay if _ndim(parameter) >= 2 else 0.0
        ratio = spec.layer_decay ** depths.get(name, 0)
        if own is not None:
            decay = decay if own.weight_decay is None else own.weight_decay
            ratio *= own.lr_ratio
        is_matrix = _ndim(parameter) >= 2 and name.startswith(inside) if inside else False
        found.setdefault((decay, ratio, is_matrix), []).append(parameter)
    return [_group(*key, members) for key, members in sorted(found.items(), reverse=True)]


def _group(
    decay: float, ratio: float, is_matrix: bool, members: list[nn.Parameter]
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": members, "weight_decay": decay}
    if ratio != 1.0:
        group[RATE_RATIO] = ratio
    if is_matrix:
        group[IS_MATRIX] = True
    return group


_NUMBERED = re.compile(r"\.(\d+)\.")


def _depths(names: set[str]) -> dict[str, int]:
    """Layers above each parameter, the head counted as one: 0 for the head, most for the embeddings.

    A layer is the first number in a name; names without one that come before any layer in a model have
    `embed` in them.
    """
    layers = {name: int(match[1]) for name in names if (match := _NUMBERED.search(name))}
    count = 1 + max(layers.values(), default=-1)
    found = {name: count - layer for name, layer in layers.items()}
    return found | {
        name: count + 1
        for name in names - layers.keys()
        if "embed" in name or ".wte." in name or ".wpe." in name
    }


def _ndim(parameter: Any) -> int:
    """Dimensions of the whole tensor, also for a parameter that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
