"""CPU stand-ins for CUDA kernels that allocate the same memory, for tracing without a GPU.

On a CPU torch uses other kernels than on a GPU: attention that materialises its scores, dropout whose mask
has its input's dtype, other dtypes under autocast. Inside `cuda_kernels()` these are replaced by functions
that allocate what the CUDA build does; the values they compute are meaningless.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from drumline.memory.attention import choose_kernel
from drumline.train.models import checkpointing, masks

_FP32_INPUTS = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "layer_norm", "log", "log10", "log1p", "log2",
    "mse_loss", "native_layer_norm", "nll_loss", "nll_loss_nd", "norm.Scalar", "pow.Scalar",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rsqrt", "sinh", "softplus", "tan",
)  # fmt: skip
_FP32_RESULT = (
    "cumprod",
    "cumsum",
    "log_softmax.int",
    "prod",
    "softmax.int",
    "sum",
    "sum.dim_IntList",
)
"""Operators of CUDA autocast (aten/src/ATen/autocast_mode.h) with inputs cast to fp32, or an fp32 result."""

_LOW = (torch.bfloat16, torch.float16)


_OPERATORS = torch.library.Library("drumline", "DEF")
"""The stand-ins' forwards as operators, so that selective checkpointing sees them as such."""


def _attention_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = q.shape
    if v.shape[3] == width:
        out = _by_rows(q)
    else:
        out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _grouped_forward(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


_STAND_INS = {
    "attention": ("(Tensor q, Tensor v) -> (Tensor, Tensor)", _attention_forward),
    "grouped_mm": ("(Tensor rows, Tensor weight) -> Tensor", _grouped_forward),
}
for _name, (_signature, _run) in _STAND_INS.items():
    _OPERATORS.define(f"{_name}{_signature}")
    for _key in ("CPU", "Meta"):
        _OPERATORS.impl(_name, _run, _key)


class _Attention(torch.autograd.Function):
    """The flash and memory-efficient kernels: both save q, k, v, the output and a log-sum-exp.

    q, k, v [B, H, S, D]; k and v may have fewer heads. Backward allocates the three gradients, a row sum, for
    bf16 and fp16 an fp32 accumulator of q's shape, and with fewer heads the gradients of k and v per head
    of q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, sums = torch.ops.drumline.attention(q, v)
        ctx.save_for_backward(q, k, v, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, sums, bias = ctx.saved_tensors
        dq, dk, dv = _by_rows(q), _by_rows(k), _by_rows(v)
        held = [torch.empty_like(sums)]
        if q.dtype in _LOW:
            held.append(torch.empty(q.shape, dtype=torch.float32, device=q.device))
        if k.shape[1] != q.shape[1]:
            held += [_by_rows(q), _by_rows(q)]
        del held
        needs_bias = ctx.needs_input_grad[3]
        return dq, dk, dv, torch.empty_like(bias) if needs_bias else None


def _by_rows(like: Tensor) -> Tensor:
    """An empty tensor [B, H, S, D] whose memory layout is [B, S, H, D]."""
    return torch.empty_like(like.transpose(1, 2)).transpose(1, 2)


class _GroupedMatmul(torch.autograd.Function):
    """Rows sorted by expert [T, h] × experts [E, h, n] -> [T, n]; saves both, in any dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.ops.drumline.grouped_mm(rows, weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight)


def _grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return _GroupedMatmul.apply(rows.to(weight.dtype), weight)  # type: ignore[no-any-return, no-untyped-call]


class _WideSoftmax(torch.autograd.Function):
    """Softmax of a bf16 or fp16 tensor to fp32 in one kernel, without an fp32 copy of the input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        out = torch.empty_like(values, dtype=torch.float32)
        ctx.save_for_backward(out)
        ctx.dtype = values.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad, dtype=ctx.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention as the CUDA build dispatches it."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(low), key.to(low), value.to(low)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    kernel = choose_kernel(
        is_narrow=query.dtype in _LOW,
        is_masked=attn_mask is not None,
        shares_heads=enable_gqa and key.shape[1] != query.shape[1],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
    )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    if kernel == "math":
        return torch.ops.aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale,
            enable_gqa=enable_gqa,
        )[0]  # fmt: skip
    return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return, no-untyped-call]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The fused kernel: allocates the output and a mask of one byte per element."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3,
             dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    if dtype is torch.float32 and input.dtype in _LOW:
        return _WideSoftmax.apply(input)  # type: ignore[no-any-return, no-untyped-call]
    assert dim is not None
    return torch.softmax(input, dim, dtype=dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Context in which CPU autocast runs in fp32 the operators that CUDA autocast does."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    hidden = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def with_wide_inputs(operator: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(hidden):
                return operator(
                    *(_wide(value) for value in arguments),
                    **{name: _wide(value) for name, value in options.items()},
                )

        return run

    def with_wide_result(operator: Any) -> Any:
        def run(values: Tensor, *arguments: Any, **options: Any) -> Any:
            is_stated = any(
                isinstance(value, torch.dtype) for value in (*arguments, *options.values())
            )
            if values.dtype in _LOW and not is_stated:
                options["dtype"] = torch.float32
            with torch._C._ExcludeDispatchKeyGuard(hidden):
                return operator(values, *arguments, **options)

        return run

    try:
        for names, changed in ((_FP32_INPUTS, with_wide_inputs), (_FP32_RESULT, with_wide_result)):
            for name in names:
                packet, _, overload = name.partition(".")
                operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, changed(operator), allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Context in which torch on a CPU allocates what it would on a GPU. Not thread-safe."""
    import transformers.integrations.moe
    import transformers.masking_utils

    with ExitStack() as stack:
        stack.enter_context(_cuda_autocast())
        for name, stand_in in (
            ("scaled_dot_product_attention", _attention),
            ("dropout", _dropout),
            ("softmax", _softmax),
        ):
            stack.enter_context(patch.object(functional, name, stand_in))
        kept = (*checkpointing.KEPT, *(f"drumline.{name}" for name in _STAND_INS))
        stack.enter_context(patch.object(checkpointing, "KEPT", kept))
        stack.enter_context(patch.object(checkpointing, "to_host", _describe))
        stack.enter_context(patch.object(checkpointing, "to_device", _empty_again))
        stack.enter_context(patch.object(transformers.integrations.moe, "_grouped_mm", _grouped_mm))
        # transformers' own reads values, which fake tensors lack.
        stack.enter_context(
            patch.object(
                transformers.masking_utils, "find_packed_sequence_indices", masks.packed_sequences
            )
        )
        yield


def _describe(tensor: Tensor) -> Any:
    """What is kept on the device of a tensor that is copied to the host."""
    return tensor.shape, tensor.dtype, tensor.device


def _empty_again(described: Any) -> Tensor:
    shape, dtype, device = described
    return torch.empty(shape, dtype=dtype, device=device)
