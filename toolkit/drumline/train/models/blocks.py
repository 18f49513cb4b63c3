"""The blocks of a model: the units of initialisation, sharding and progress reports."""

import torch
from torch import nn

BATCHNORM = nn.modules.batchnorm._BatchNorm


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks to initialise and shard: a transformer's layers, else children with parameters.

    A model of transformers names its layers' classes, or has them derive from one class.
    """
    names = set(getattr(model, "_no_split_modules", None) or _checkpointed_layers(model))
    found = [(n, m) for n, m in model.named_modules() if names & _kinds(m)]
    found = [
        (n, m)
        for n, m in found
        if not any(n != other and n.startswith(f"{other}.") for other, _ in found)
    ]
    if names:
        return found
    return [(n, m) for n, m in model.named_children() if any(True for _ in m.parameters())]


def tied_blocks(model: nn.Module) -> set[int]:
    """The ids of blocks that have a weight which a module outside of them has, too, such as a tied head.

    FSDP2 gathers a weight for one group of modules alone, so these are sharded with the root.
    """
    found = set()
    for _, block in named_blocks(model):
        inside = {id(module) for module in block.modules()}
        own = {id(weight) for weight in block.parameters()}
        others = (m for m in model.modules() if id(m) not in inside)
        if any(id(p) in own for m in others for p in m.parameters(recurse=False)):
            found.add(id(block))
    return found


def _kinds(module: nn.Module) -> set[str]:
    """The name of its class, also if FSDP2 has replaced it by one that derives from it."""
    kinds = type(module).__mro__[: 2 if type(module).__name__.startswith("FSDP") else 1]
    return {kind.__name__ for kind in (*kinds, *(type(module).__bases__ if len(kinds) > 1 else ()))}


def _checkpointed_layers(model: nn.Module) -> set[str]:
    """Names of the classes of layers that transformers can checkpoint; empty for a model of others."""
    if not hasattr(model, "gradient_checkpointing_enable"):
        return set()
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {type(m).__name__ for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer is a BatchNorm."""
    return any(isinstance(module, BATCHNORM) for module in model.modules())


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of this module without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
