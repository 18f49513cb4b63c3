"""AdamW whose moments are kept in 8 bits, with a scale for every 256 values of a row (Dettmers et al. 2022).

Blocks never cross rows, and FSDP2 shards rows, so a shard has the same bytes as that part of the whole:
training and checkpoints do not depend on the split. Small tensors and vectors keep fp32 moments, by their
global size. Between steps a moment is code × scale; a code counts from that of zero, so that a zeroed state
is a moment of zero.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from drumline.memory.load import EIGHT_BIT_AT_ONCE
from drumline.train.updates.adamw import adamw_update, apply_adamw
from drumline.train.updates.by_parameter import ByParameter

BLOCK = 256
LEAST = 4096
"""Elements of a tensor, from which on its moments are kept in 8 bits."""
_DECADES = 7


class AdamW8bit(ByParameter):
    """State of a large matrix: `step`, and of each moment `…_code`, uint8 of its shape, and `…_scale`."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._books: dict[torch.device, tuple[Codebook, Codebook]] = {}

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a large matrix in blocks, any other tensor as AdamW does."""
        if parameter.ndim < 2 or parameter.numel() < LEAST:
            adamw_update(parameter, self.state[parameter], group)
        else:
            self._update_blocks(parameter, gradient, group)

    def _update_blocks(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{name}_code"] = _like(parameter, parameter.shape, torch.uint8)
                blocks = (*parameter.shape[:-1], -(-parameter.shape[-1] // BLOCK))
                state[f"{name}_scale"] = _like(parameter, torch.Size(blocks), torch.float32)
        state["step"] += 1
        weights, gradient = _rows(parameter), _rows(gradient)
        kept = {name: _rows(value) for name, value in state.items() if name != "step"}
        size = max(1, EIGHT_BIT_AT_ONCE // weights.shape[-1])
        for start in range(0, weights.shape[0], size):
            rows = slice(start, start + size)
            self._update(weights[rows], gradient[rows], {n: v[rows] for n, v in kept.items()},
                         state["step"], group)  # fmt: skip

    def _update(
        self,
        weights: Tensor,
        gradient: Tensor,
        kept: dict[str, Tensor],
        step: Tensor,
        group: dict[str, Any],
    ) -> None:
        first, second = group["betas"]
        gradient = gradient.float()
        if weights.device not in self._books:
            self._books[weights.device] = (
                Codebook(True, weights.device),
                Codebook(False, weights.device),
            )
        signed, unsigned = self._books[weights.device]
        average = signed.widened(kept["exp_avg_code"], kept["exp_avg_scale"])
        square = unsigned.widened(kept["exp_avg_sq_code"], kept["exp_avg_sq_scale"])
        average.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        apply_adamw(weights, average.to(weights.dtype), square.to(weights.dtype), step, group)
        signed.narrow(average, kept["exp_avg_code"], kept["exp_avg_scale"])
        unsigned.narrow(square, kept["exp_avg_sq_code"], kept["exp_avg_sq_scale"])


def _like(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of this global shape, sharded along rows like the parameter."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    local = parameter.to_local()
    own = torch.zeros((*local.shape[:-1], shape[-1]), dtype=dtype, device=local.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )


def _rows(tensor: Tensor | None) -> Tensor:
    """This rank's part of a tensor as a matrix [rows, last dimension], sharing its memory."""
    assert tensor is not None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.view(-1, local.shape[-1])


@functools.cache
def values_of(is_signed: bool) -> list[float]:
    """The values of the codes between -1 and 1, ascending.

    Seven decades down from 1, each with twice as many values as the one below (the dynamic tree of Dettmers
    2016); with a sign half as many.
    """
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        count = 2**decade * (1 if is_signed else 2)
        scale = 10.0 ** (decade + 1 - _DECADES)
        middles = [scale * (0.1 + 0.9 * (2 * place + 1) / (2 * count)) for place in range(count)]
        found += middles + ([-value for value in middles] if is_signed else [])
    assert len(found) <= 256
    return sorted(found)


class Codebook:
    """The values of codes on a device. A code counts from that of zero, modulo 256."""

    def __init__(self, is_signed: bool, device: torch.device) -> None:
        values = values_of(is_signed)
        self._values = torch.tensor(values, device=device)
        self._bounds = (self._values[:-1] + self._values[1:]) / 2
        self._zero = values.index(0.0)

    def widened(self, code: Tensor, scale: Tensor) -> Tensor:
        """The moments [rows, n] of these codes and scales, fp32."""
        places = (code.int() + self._zero) % 256
        wide = scale.repeat_interleave(BLOCK, dim=-1)[:, : code.shape[-1]]
        return self._values[places] * wide

    def narrow(self, moment: Tensor, code: Tensor, scale: Tensor) -> None:
        """Write the nearest codes, and the scales, of the moments [rows, n] in place."""
        rows, length = moment.shape
        padded = torch.nn.functional.pad(moment, (0, scale.shape[-1] * BLOCK - length))
        blocks = padded.view(rows, -1, BLOCK)
        largest = blocks.abs().amax(dim=-1)
        scale.copy_(largest)
        share = blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
        places = torch.bucketize(
            share.view(rows, -1)[:, :length].contiguous(), self._bounds, out_int32=True
        )
        code.copy_(((places - self._zero) % 256).to(torch.uint8))
