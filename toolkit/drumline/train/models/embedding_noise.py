"""NEFTune (Jain et al. 2023): uniform noise on the input embeddings, while the model trains.

Every row has noise of its own, drawn from (seed, step, its place in the step), so that it does not depend on
the split of the batch: a device's generator gives the same numbers for the same shape, whatever row it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from drumline.errors import PlanError
from drumline.train.models.seeds import derived_seed


class EmbeddingNoise:
    """Adds alpha / √(L·d) × uniform(−1, 1) to the embedding of each of a row's L tokens, of d features.

    `longest`: tokens of the longest row of the run, so that noise is always drawn in one shape.
    """

    def __init__(self, model: Any, alpha: float, seed: int, longest: int) -> None:
        self._alpha, self._seed, self._longest = alpha, seed, longest
        self._lengths: Tensor | None = None
        self._step = self._first_slot = 0
        embeddings = model.get_input_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise PlanError(
                f"model.neftune_alpha: {type(model).__name__} has no embedding of tokens. Nearest: "
                "model.neftune_alpha=null"
            )
        embeddings.register_forward_hook(self._add)

    def begin(self, step: int, first_slot: int, lengths: Tensor) -> None:
        """Before a forward that trains: its step and first slot, and the tokens of each row, int64 [n]."""
        self._step, self._first_slot, self._lengths = step, first_slot, lengths

    def end(self) -> None:
        """After it: forwards that evaluate have no noise."""
        self._lengths = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self._lengths is None:
            return output
        rows, tokens, features = output.shape
        noise = torch.stack(
            [self._of_row(row, features, output.device)[:tokens] for row in range(rows)]
        )
        scales = self._alpha / torch.sqrt(self._lengths.float() * features)
        return output + (noise * scales[:, None, None]).to(output.dtype)

    def _of_row(self, row: int, features: int, device: torch.device) -> Tensor:
        """Uniform in [−1, 1), float32 [longest, features]."""
        generator = torch.Generator(device)
        slot = self._first_slot + row
        generator.manual_seed(derived_seed("neftune", self._seed, self._step, slot))
        shape = (self._longest, features)
        return torch.rand(shape, generator=generator, device=device) * 2 - 1
