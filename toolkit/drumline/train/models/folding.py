"""Folds weights into rows or into one column, so that FSDP2 shards them without much padding.

FSDP2 shards dimension 0, and pads it to a multiple of the ranks: the weights [8, 2f, h] of 8 experts would
be 64 times as large on 512 ranks. Folded to [8·2f, h], they are divided like any other matrix. The forward
sees a view of the original shape. A weight that two modules share is left as it is, because a
parametrization belongs to one module; so are all, if the optimizer does not work element by element.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from drumline.architectures.shapes import folded

Place = tuple[int, str]
"""A weight's module, by its id, and its name there."""

_MARK, _LEAF = "parametrizations.", ".original"


class _Unfold(nn.Module):
    """The folded weight as a tensor of its original shape, without a copy."""

    def __init__(self, shape: torch.Size, folded_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self._folded = shape, folded_shape

    def forward(self, weight: Tensor) -> Tensor:
        return weight.view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The folded weight."""
        return weight.reshape(self._folded)


def fold_weights(module: nn.Module, ranks: int, shared: Collection[Place]) -> None:
    """Fold the weights that sharding over `ranks` would pad too much; in place, before `fully_shard`.

    `shared`: where the weights are that several modules share, from `shared_weights`.
    """
    for part in list(module.modules()):
        if isinstance(part, parametrize.ParametrizationList):
            continue
        for name, weight in list(part.named_parameters(recurse=False)):
            shape = folded(tuple(weight.shape), ranks)
            if shape != tuple(weight.shape) and (id(part), name) not in shared:
                unfold = _Unfold(weight.shape, shape)
                parametrize.register_parametrization(part, name, unfold, unsafe=True)


def shared_weights(model: nn.Module) -> set[Place]:
    """Where the weights are that more than one module has, in a model as it was built."""
    places: dict[int, list[Place]] = {}
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            places.setdefault(id(weight), []).append((id(part), name))
    return {place for shared in places.values() if len(shared) > 1 for place in shared}


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
