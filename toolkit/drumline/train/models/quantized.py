"""Linear layers whose frozen weights are kept in 4 or 8 bits, and widened for every product.

A row is quantised by itself, in blocks with a scale each, so that any rows have the bytes that they have in
the whole. All is stored as bytes, rows first: FSDP2 shards it by rows, and no precision policy casts a scale.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from drumline.architectures.trained import NF4_BLOCK
from drumline.memory.load import WIDENED_AT_ONCE

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat4: quantiles of a normal distribution in [-1, 1] (Dettmers et al. 2023, appendix E)."""


class QuantizedLinear(nn.Linear):
    """A linear layer that has `weight` while it is filled, and `packed` and `scales`, both uint8, afterwards.

    `packed`: [out, in/2] for nf4, two weights a byte, the first in the high bits; [out, in] for int8.
    `scales`: the bytes of fp32 [out, in/64] for nf4, of [out, 1] for int8.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, like: nn.Linear, kind: str) -> None:
        has_bias, dtype = like.bias is not None, like.weight.dtype
        super().__init__(like.in_features, like.out_features, has_bias, device="meta", dtype=dtype)
        self.kind = kind
        self.requires_grad_(False)

    @property
    def is_filled(self) -> bool:
        """Whether its weights are packed already."""
        return "packed" in self._parameters

    @torch.no_grad()
    def pack(self) -> None:
        """Replace `weight` by `packed` and `scales`; on the meta device by tensors of their shapes."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        packed, scales = packing(self.kind, weight.float())
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales.contiguous().view(torch.uint8), requires_grad=False)

    @torch.no_grad()
    def unpack(self) -> None:
        """Have `weight` again, in fp32, of what the bytes stand for; the layer computes no more."""
        weight = self.widened(torch.float32)
        del self.packed, self.scales
        self.weight = nn.Parameter(weight, requires_grad=False)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] that the bytes stand for."""
        found = torch.empty(
            self.out_features, self.in_features, dtype=dtype, device=self.packed.device
        )
        size = max(1, WIDENED_AT_ONCE // self.in_features)
        for start in range(0, self.out_features, size):
            rows = slice(start, start + size)
            found[rows] = unpacked(
                self.kind, self.packed[rows], self.scales[rows].view(torch.float32)
            )
        return found

    def forward(self, input: Tensor) -> Tensor:
        """X [..., in] -> [..., out], in autocast's dtype if it is on."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        with torch.autocast(kind, enabled=False):
            found: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
            return found if bias is None else found + bias


class _Product(torch.autograd.Function):
    """X · Wᵀ, which keeps neither: the backward widens W again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, input.dtype
        return functional.linear(input, layer.widened(input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.widened(gradient.dtype), None


def quantise(model: nn.Module, kind: str, names: set[str]) -> None:
    """Put quantised layers in the place of these linear layers, on the meta device."""
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(linear, kind))


def packing(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of weights [out, in], fp32, and their scales, fp32: the largest of each block of a row."""
    rows, columns = weight.shape
    if kind == "int8":
        scales = weight.abs().amax(dim=1, keepdim=True)
        share = weight / torch.where(scales > 0, scales, 1.0)
        return ((share * 127).round() + 128).to(torch.uint8), scales
    blocks = weight.view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    scales = blocks.abs().amax(dim=2)
    share = (blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(2)).view(rows, columns)
    values = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(share, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2], scales


def unpacked(kind: str, packed: Tensor, scales: Tensor) -> Tensor:
    """The weights that these rows of bytes and scales stand for, fp32."""
    if kind == "int8":
        return (packed.float() - 128) * (scales / 127)
    values = torch.tensor(NF4, device=packed.device)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    wide = pairs[packed.int()].view(*packed.shape[:-1], -1, NF4_BLOCK)
    return (wide * scales.unsqueeze(-1)).view(*packed.shape[:-1], -1)
