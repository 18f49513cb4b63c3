"""Activation checkpointing of transformers' layers: everything, or all but matrix products and attention.

Each layer's forward runs in torch's non-reentrant checkpoint. `selective` keeps the outputs of matrix
products and attention kernels, which cost most to compute, and recomputes the rest in the backward. With
offload, what a checkpoint keeps of the layer's input waits in host memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from drumline.errors import PlanError

KEPT = (
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm", "aten.convolution",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "flash_attn._flash_attn_forward",
)  # fmt: skip
"""Operators whose outputs `selective` keeps."""


def enable_checkpointing(model: Any, policy: str, offload: bool) -> None:
    """Checkpoint every layer; `policy`: `full` or `selective`.

    PlanError for a model that is not transformers'.
    """
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise PlanError(
            f"model.activation_checkpointing: {policy} is for transformers models; this model comes "
            "from a factory, which can call torch.utils.checkpoint itself. Nearest: none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _kept())
    # Its older name is deprecated in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    if offload:
        for module in model.modules():
            run = getattr(module, "_gradient_checkpointing_func", None)
            if run is not None:
                module._gradient_checkpointing_func = functools.partial(_offloaded, run)


def _kept() -> list[Any]:
    """Those of `KEPT` that this torch has."""
    found = []
    for name in KEPT:
        library, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, library), operator, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return found


def _offloaded(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a checkpoint whose inputs wait in host memory.

    Both copies are asynchronous on the current stream; torch's allocator of pinned memory does not reuse a
    buffer before they are done.
    """
    with saved_tensors_hooks(to_host, to_device):
        return run(*arguments, **options)


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """The tensor's device, and its copy in pinned memory; a tensor in host memory stays as it is."""
    if not tensor.is_cuda:
        return tensor.device, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    """The tensor of `to_host` on its device again."""
    device, host = packed
    return host.to(device, non_blocking=True)
