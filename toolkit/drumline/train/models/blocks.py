"""The units of a model: what is initialised, sharded and counted as progress, one at a time."""

import torch
from torch import nn

BATCHNORM = nn.modules.batchnorm._BatchNorm


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The units to initialise and to shard: a transformer's layers, else children with weights."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in names]
    found = [
        (n, m)
        for n, m in found
        if not any(n != other and n.startswith(f"{other}.") for other, _ in found)
    ]
    if names:
        return found
    return [(n, m) for n, m in model.named_children() if any(True for _ in m.parameters())]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer keeps running statistics of the batch."""
    return any(isinstance(module, BATCHNORM) for module in model.modules())


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of this module alone, not of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
