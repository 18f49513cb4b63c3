"""Peak bytes of one rank in closed form: no torch, instant, for known dense decoders.

Letters: T tokens of a micro-batch, h hidden, f ffn, kv key/value width, H heads, V vocabulary,
L layers, P parameters, N shards. The coefficients of activations were fitted to traces of
transformers' GPT-2 and Llama under fake tensors with a flash attention kernel; on a real GPU they
are not yet measured, which is what the width of the range stands for.
"""

from dataclasses import dataclass
from typing import Literal

from toolkit.plan.gpus import Gpu
from toolkit.plan.shapes import ModelShape

Precision = Literal["fp32", "bf16", "bf16-pure", "fp16"]

CHUNK_TOKENS = 1024
"""Tokens whose logits are alive at once when the loss is chunked (`train/loss.py`)."""

_ACTIVATION_RANGE = (0.9, 1.15)
_RESERVED_RATIO = (1.015, 1.08, 1.265)  # of what is not state: classic allocator, replayed traces
_CONTEXT_BYTES = (300e6, 500e6, 700e6)  # CUDA context
_NCCL_BYTES = (500e6, 1000e6, 2000e6)  # one node; the high value doubles over several nodes
_DDP_BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Load:
    """What a rank is asked to hold; `shard_ranks` is how many ranks share a sharded tensor."""

    shape: ModelShape
    per_device: int
    sequence_length: int
    ranks: int
    nodes: int
    shard_ranks: int
    strategy: str
    precision: Precision
    optimizer: str
    momentum: bool
    foreach: bool
    checkpointing: bool
    eager_attention: bool
    chunked_loss: bool


@dataclass(frozen=True)
class ByteRange:
    """Bytes: low, expected, high."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True)
class Peak:
    """The estimate: bytes of each part at the peak, three totals with ranges, and the phase."""

    parts: dict[str, int]
    allocated: ByteRange
    reserved: ByteRange
    device: ByteRange
    phase: str


def estimate(load: Load, gpu: Gpu) -> Peak:
    """The largest of three phases: forward + loss, backward, optimizer step."""
    states = _states(load)
    activations, loss = _activations(load), _loss(load)
    communication = _communication(load)
    backward = _backward_temporaries(load)
    held = {"parameters": states["parameters"], "optimizer": states["optimizer"]}
    phases = {
        "forward + loss": {
            **held,
            "gradients": states["gradients"],
            "activations": activations,
            "loss": loss,
            "communication": communication,
        },
        "backward": {
            **held,
            "gradients": states["gradients"],
            "activations": (_layer_activations(load) if load.checkpointing else 0) + backward,
            "communication": communication,
        },
        "optimizer step": {
            **held,
            "gradients": states["gradients"],
            "activations": states["foreach_temporary"],
        },
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    names = ("parameters", "gradients", "optimizer", "activations", "loss", "communication")
    parts = {name: int(phases[phase].get(name, 0)) for name in names}
    parts["workspace"] = gpu.workspace_bytes
    return _with_ranges(parts, phase, load, gpu)


def _states(load: Load) -> dict[str, float]:
    """Parameters, gradients and optimizer state after sharding (ZeRO, Rajbhandari et al. 2020)."""
    count = load.shape.parameters
    width = 2 if load.precision == "bf16-pure" else 4
    moments = 2 if load.optimizer in ("adamw", "adam") else int(load.momentum)
    shards = load.shard_ranks
    return {
        "parameters": count * width / (shards if load.strategy in ("fsdp", "zero3") else 1),
        "gradients": count * width / (shards if load.strategy in ("fsdp", "zero2", "zero3") else 1),
        "optimizer": count * width * moments / (1 if load.strategy == "ddp" else shards),
        "foreach_temporary": count
        * width
        * int(load.foreach)
        / (1 if load.strategy == "ddp" else shards),
    }


def _layer_activations(load: Load) -> float:
    """Bytes that one layer keeps for its backward, flash attention: fitted, see the module's head."""
    s = load.shape
    h, f, kv, heads = s.hidden, s.ffn, s.kv_width, s.heads
    mixed = load.precision in ("bf16", "fp16")
    if s.family == "gpt2":
        per_token = 20 * h + 16 * f if mixed else 16 * h + 10 * f
    else:
        per_token = 30 * h + 4 * kv + 8 * f if mixed else 20 * h + 4 * kv + 8 * f
    if load.precision == "fp32":
        per_token *= 2
    tokens = load.per_device * load.sequence_length
    bytes_kept = tokens * (per_token + 4 * heads + 16)
    if load.eager_attention:  # scores and probabilities [b, H, S, S], kept for the backward
        width = 4 if load.precision == "fp32" else 2
        bytes_kept += 2 * width * heads * tokens * load.sequence_length
    autocast_copies = 2 * s.linear_per_layer if mixed and load.strategy != "fsdp" else 0
    return bytes_kept + autocast_copies


def _activations(load: Load) -> float:
    """All layers, or with checkpointing each layer's input; and the head's own."""
    s, tokens = load.shape, load.per_device * load.sequence_length
    width = 2 if load.precision == "bf16-pure" else 4
    kept = width * s.hidden * tokens if load.checkpointing else _layer_activations(load)
    mixed = load.precision in ("bf16", "fp16")
    head = (10 if mixed else 2 * width) * s.hidden * tokens + (
        2 * s.embedding_parameters if mixed else 0
    )
    return s.layers * kept + head


def _loss(load: Load) -> float:
    """12·V·T: the logits in fp32, their log-softmax and its gradient, alive together."""
    tokens = load.per_device * load.sequence_length
    return (
        12.0 * load.shape.vocabulary * (min(CHUNK_TOKENS, tokens) if load.chunked_loss else tokens)
    )


def _backward_temporaries(load: Load) -> float:
    """Gradients of the widest activations of one layer."""
    s, tokens = load.shape, load.per_device * load.sequence_length
    width = 4 if load.precision == "fp32" else 2
    return tokens * width * max(4 * s.ffn, 4 * s.hidden)


def _communication(load: Load) -> float:
    """DDP: two buckets in flight. FSDP2: the largest wrapped block (a layer, or the root).

    Unsharded, with the prefetched next one, its gradients and the reduce-scatter input: 10 B a
    parameter of the block in bf16, 16 B in fp32.
    """
    if load.ranks == 1:
        return 0
    if load.strategy in ("ddp", "zero1", "zero2"):
        return 2 * min(_DDP_BUCKET_BYTES, _states(load)["gradients"])
    root = load.shape.parameters - load.shape.layers * load.shape.layer_parameters
    per_parameter = 16 if load.precision == "fp32" else 10
    return per_parameter * max(load.shape.layer_parameters, root)


def _with_ranges(parts: dict[str, int], phase: str, load: Load, gpu: Gpu) -> Peak:
    """Allocated, reserved and device-used bytes, each low, expected and high."""
    state = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    moving = sum(parts.values()) - state
    allocated = [
        state + moving * factor for factor in (_ACTIVATION_RANGE[0], 1.0, _ACTIVATION_RANGE[1])
    ]
    if gpu.is_cpu:
        reserved = device = allocated
    else:
        reserved = [
            state + (bytes_ - state) * ratio
            for bytes_, ratio in zip(allocated, _RESERVED_RATIO, strict=True)
        ]
        nccl = _NCCL_BYTES if load.ranks > 1 else (0, 0, 0)
        device = [
            total + context + network * (2 if load.nodes > 1 and index == 2 else 1)
            for index, (total, context, network) in enumerate(
                zip(reserved, _CONTEXT_BYTES, nccl, strict=True)
            )
        ]
    return Peak(parts, _range(allocated), _range(reserved), _range(device), phase)


def _range(three: list[float]) -> ByteRange:
    return ByteRange(*(int(value) for value in three))
