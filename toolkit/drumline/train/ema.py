"""The exponential moving average of the trained weights (`ema`), of this rank's shards and in fp32."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from drumline.train.tensor_shard import TensorShard

PREFIX = "ema."
"""Of the averages' names among all tensors of a checkpoint."""


class Ema:
    """average ← decay × average + (1 − decay) × weight, after every optimizer step that is not skipped.

    `weights`: this rank's shards by the parameters' names; their tensors are those that the optimizer
    updates. `applied`: called after the weights were replaced, to update what is derived from them.
    """

    def __init__(
        self, decay: float, weights: dict[str, TensorShard], applied: Callable[[], None]
    ) -> None:
        self._decay, self._weights, self._applied = decay, weights, applied
        self.averages = {
            name: torch.empty_like(shard.tensor, dtype=torch.float32)
            for name, shard in weights.items()
        }
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Begin with the weights as they are now."""
        for name, shard in self._weights.items():
            self.averages[name].copy_(shard.tensor)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the averages."""
        for name, shard in self._weights.items():
            self.averages[name].lerp_(shard.tensor.float(), 1.0 - self._decay)

    def shards(self) -> Iterator[tuple[str, TensorShard]]:
        """The averages as shards of a checkpoint, each beside its weight."""
        for name, shard in self._weights.items():
            yield f"{PREFIX}{name}", dataclasses.replace(shard, tensor=self.averages[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model computes with the averages; a collective where weights are derived.

        fp32 weights change places with them, so that no memory is needed but for the largest one.
        """
        kept = {name: self._put(name) for name in self._weights}
        self._applied()
        yield
        for name, weight in kept.items():
            self._take_back(name, weight)
        self._applied()

    @torch.no_grad()
    def _put(self, name: str) -> Tensor | None:
        """Put an average in its weight's place; returns the weight, unless it is where the average was."""
        weight, average = self._weights[name].tensor, self.averages[name]
        kept = weight.clone()
        weight.copy_(average)
        if weight.dtype != average.dtype:
            return kept
        average.copy_(kept)
        return None

    @torch.no_grad()
    def _take_back(self, name: str, weight: Tensor | None) -> None:
        place, average = self._weights[name].tensor, self.averages[name]
        if weight is None:
            weight = average.clone()
            average.copy_(place)
        place.copy_(weight)
