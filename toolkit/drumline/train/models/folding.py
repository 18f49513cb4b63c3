"""Folds weights of three or more dimensions into rows, so that FSDP2 can shard them without padding.

FSDP2 shards dimension 0, and pads it to a multiple of the ranks: the weights [8, 2f, h] of 8 experts would
be 64 times as large on 512 ranks. Folded to [8·2f, h], they are divided like any other matrix. The forward
sees a view of the original shape.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from drumline.architectures.shapes import is_folded

_MARK, _LEAF = "parametrizations.", ".original"


class _Unfold(nn.Module):
    """Rows [n, m] as the tensor of its original shape, without a copy."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, rows: Tensor) -> Tensor:
        return rows.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The rows of a weight."""
        return weight.reshape(-1, weight.shape[-1])


def fold_weights(module: nn.Module, ranks: int) -> None:
    """Fold the weights that sharding over `ranks` would pad too much; in place, before `fully_shard`."""
    for part in list(module.modules()):
        for name, weight in list(part.named_parameters(recurse=False)):
            if not isinstance(part, parametrize.ParametrizationList) and is_folded(
                tuple(weight.shape), ranks
            ):
                parametrize.register_parametrization(part, name, _Unfold(weight.shape), unsafe=True)


def unfolded_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Original name -> original shape, of all folded weights."""
    return {
        original_name(f"{name}{_LEAF}"): tuple(part[0].shape)  # type: ignore[union-attr, arg-type]
        for name, part in module.named_modules()
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], _Unfold)
    }


def original_name(name: str) -> str:
    """The name that a parameter has without folding."""
    if name.endswith(_LEAF) and _MARK in name:
        before, _, leaf = name.removesuffix(_LEAF).rpartition(_MARK)
        return before + leaf
    return name
