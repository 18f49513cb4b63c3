"""torch.compile of a training module: each kind of repeated block once, and the loss of its logits.

A model of 32 equal layers compiled as a whole is 32 copies of a layer to the compiler; block by block they
share one. FSDP2's and DeepSpeed's hooks, which gather a block's weights, stay between the compiled parts.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

from drumline.train.models.blocks import named_blocks
from drumline.train.objectives.base import ObjectiveModule
from drumline.train.objectives.cross_entropy import TokenCrossEntropy, token_loss_sum


def compile_module(module: ObjectiveModule, backend: Any = "inductor") -> None:
    """Compile in place; a model without repeated blocks as a whole. `backend`: what torch.compile takes."""
    repeated = repeated_blocks(module.model)
    if not repeated:
        module.compile(backend=backend)
        return
    for block in repeated:
        block.compile(backend=backend)
    if isinstance(module.objective, TokenCrossEntropy):
        module.objective.loss_of_logits = torch.compile(token_loss_sum, backend=backend)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of which the model has several of one class; torch's own classes are no blocks."""
    blocks = [(_class_of(block), block) for _, block in named_blocks(model)]
    kinds = Counter(kind for kind, _ in blocks if not kind.__module__.startswith("torch.nn."))
    return [block for kind, block in blocks if kinds[kind] > 1]


def _class_of(module: nn.Module) -> type:
    """Its class, also if FSDP2 has put one of its own before it."""
    return next(kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))
