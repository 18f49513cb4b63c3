"""The shape of a known transformer: its widths and the shapes of all its weights. Pure."""

import math
from dataclasses import dataclass
from functools import cached_property

from drumline.architectures.structures import LLAMA, Structure

ACTIVATIONS = {
    "gelu": "input",
    "gelu_pytorch_tanh": "input",
    "silu": "input",
    "swish": "input",
    "relu": "output",
    "tanh": "output",
    "gelu_new": "terms",
}
"""By name in transformers' configs: what the backward of one kernel needs, or "terms" for a kernel a term."""

Tensors = dict[str, tuple[int, ...]]
"""Weights by name, with their shapes."""

_MOST_PADDING = 1 / 64
"""Share of a weight that FSDP2 may pad before the weight is folded."""


@dataclass(frozen=True)
class ModelShape:
    """Widths of a transformer; sizes are numbers of elements, not bytes.

    `family`: the structure of its layers. `ffn`: the feed-forward width, with `experts` that of one expert.
    Each token is routed to `top_k` experts. `positions`: learned positions of a text model, of which no token
    takes `unused_positions`; None for rotary ones, and for images, which have `patches` + 1. `types`: token
    types of an encoder. `has_embedding_block`: its embeddings are a block like a layer, which FSDP2 shards by
    itself. `drops_attention`: it has dropout after attention. `classes`: classes of a classifier, None for a
    language model. `patches`: patches per image, and `patch_inputs` the numbers in one; 0 for text. `window`:
    sliding window in tokens; attention over longer rows is given a mask. `activation`: as in the config.
    `structure`: of a decoder's layers. `rotary_share`: share of a head's features with rotary positions.
    `windowed` and `rotated`: of each layer, whether it has the window and rotary positions; empty if all are
    alike.
    """

    family: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    head_dim: int
    kv_width: int
    ffn: int
    vocabulary: int
    tied: bool
    dropout: float = 0.0
    positions: int | None = None
    classes: int | None = None
    experts: int = 0
    top_k: int = 0
    patches: int = 0
    patch_inputs: int = 0
    window: int | None = None
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    activation: str = "silu"
    structure: Structure = LLAMA
    unused_positions: int = 0
    types: int = 0
    has_embedding_block: bool = False
    drops_attention: bool = True
    rotary_share: float = 1.0
    windowed: tuple[bool, ...] = ()
    rotated: tuple[bool, ...] = ()

    @property
    def query_width(self) -> int:
        """Output features of the query projection: heads × head_dim."""
        return self.heads * self.head_dim

    @cached_property
    def layer_parameters(self) -> int:
        """Number of parameters of one layer."""
        return count(layer_tensors(self))

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.layers * self.layer_parameters + count(outer_tensors(self))

    @cached_property
    def active_per_layer(self) -> int:
        """Elements of one layer's matrices that a token is multiplied with; only `top_k` experts count."""
        matrices = {
            n: math.prod(sizes) for n, sizes in layer_tensors(self).items() if len(sizes) > 1
        }
        for name in ("gate_up", "down") if self.experts else ():
            matrices[name] = matrices[name] // self.experts * self.top_k
        return sum(matrices.values())

    def tokens(self, sequence_length: int | None) -> int:
        """Tokens per sample: patches plus the class token for an image, or the sequence length."""
        if self.patches:
            return self.patches + 1
        assert sequence_length
        return sequence_length

    def flops_per_sample(self, sequence_length: int | None) -> int:
        """FLOPs of forward and backward for one sample.

        Per token: 6 × active matrix elements + 12 × layers × query width × tokens (Chowdhery et al. 2022,
        PaLM, appendix B).
        """
        tokens = self.tokens(sequence_length)
        head = self.vocabulary * self.hidden if self.classes is None else 0
        matrices = self.layers * self.active_per_layer + head
        attention = 12 * self.layers * self.query_width * tokens
        return (6 * matrices + attention) * tokens


def layer_tensors(shape: ModelShape) -> Tensors:
    """All weights of one layer."""
    h, f, q, kv = shape.hidden, shape.ffn, shape.query_width, shape.kv_width
    tensors: Tensors
    if shape.family == "gpt2":  # Conv1D keeps its weights transposed
        tensors = {"qkv": (h, 3 * h), "out": (h, h), "up": (h, f), "down": (f, h)}
        return tensors | {"qkv_bias": (3 * h,), "up_bias": (f,)} | _vectors(h, 6)
    if shape.structure.packs_qkv:
        tensors = {"qkv": (q + 2 * kv, h), "out": (h, q)}
    else:
        tensors = {"q": (q, h), "k": (kv, h), "v": (kv, h), "out": (h, q)}
    if shape.has_qkv_bias:
        tensors |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if shape.family in ("bert", "vit"):
        return tensors | {"up": (f, h), "down": (h, f), "up_bias": (f,)} | _vectors(h, 6)
    return tensors | _decoder_tensors(shape)


def _decoder_tensors(shape: ModelShape) -> Tensors:
    """A decoder layer's weights besides the biases of q, k and v; packed weights replace separate ones."""
    h, f, q, kv, e = shape.hidden, shape.ffn, shape.query_width, shape.kv_width, shape.experts
    structure = shape.structure
    tensors: Tensors = {}
    if shape.has_out_bias:
        tensors |= {"out_bias": (h,)}
    if structure.qk_norm:
        widths = (q, kv) if structure.qk_norm == "full" else (shape.head_dim, shape.head_dim)
        tensors |= {"q_norm": (widths[0],), "k_norm": (widths[1],)}
    if e:
        tensors |= {"router": (e, h), "gate_up": (e, 2 * f, h), "down": (e, h, f)}
    elif structure.feed_forward == "plain":
        tensors |= {"up": (f, h), "down": (h, f)}
        if shape.has_mlp_bias:
            tensors |= {"up_bias": (f,), "down_bias": (h,)}
    elif structure.feed_forward == "gated_packed":
        tensors |= {"gate_up": (2 * f, h), "down": (h, f)}
    else:
        tensors |= {"gate": (f, h), "up": (f, h), "down": (h, f)}
        if shape.has_mlp_bias:
            tensors |= {"gate_bias": (f,), "up_bias": (f,), "down_bias": (h,)}
    return tensors | _vectors(h, structure.norms * (1 + structure.has_shift))


def outer_tensors(shape: ModelShape) -> Tensors:
    """All weights outside the layers: embeddings, norms, pooler and head."""
    h, classes = shape.hidden, shape.classes
    tensors: Tensors
    if shape.patches:
        tensors = {"patch": (h, shape.patch_inputs), "class": (1, 1, h)}
        tensors |= {"positions": (1, shape.patches + 1, h)} | _vectors(h, 3)
    else:
        tensors = {"embedding": (shape.vocabulary, h)}
        if shape.positions:
            tensors |= {"positions": (shape.positions, h)}
        tensors |= _vectors(
            h, 1 if shape.family == "decoder" and not shape.structure.has_shift else 2
        )
    if shape.family == "bert":
        tensors |= {"pooler": (h, h), "pooler_bias": (h,)}
        if shape.types:
            tensors |= {"types": (shape.types, h)}
    if classes is not None:
        tensors |= {"head": (classes, h)}
        if shape.family in ("bert", "vit"):
            tensors |= {"head_bias": (classes,)}
    elif not shape.tied:
        tensors |= {"head": (shape.vocabulary, h)}
    if shape.has_head_bias and classes is None:
        tensors |= {"head_bias": (shape.vocabulary,)}
    return tensors


def _vectors(length: int, number: int) -> Tensors:
    """`number` vectors of one length: scales and shifts of norms, and biases."""
    return {f"vector_{index}": (length,) for index in range(number)}


def count(tensors: Tensors) -> int:
    """Total number of elements."""
    return sum(math.prod(sizes) for sizes in tensors.values())


def folded(sizes: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The shape in which FSDP2 shards a weight over `ranks`: its own, or one that needs less padding.

    FSDP2 pads dimension 0 to a multiple of the ranks. A weight of several dimensions that it would pad by
    more than 1/64 is folded into rows, or into a single column (`train/models/folding.py`).
    """
    candidates = [sizes]
    if len(sizes) > 2:
        candidates.append((math.prod(sizes[:-1]), sizes[-1]))
    if len(sizes) > 1:
        candidates.append((math.prod(sizes), 1))
    paddings = [-(rows[0] if rows else 1) % ranks / (rows[0] if rows else 1) for rows in candidates]
    for shape, padding in zip(candidates, paddings, strict=True):
        if padding <= _MOST_PADDING:
            return shape
    return candidates[paddings.index(min(paddings))]


def shard_size(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements of the first rank's shard of a weight, the largest one, with its padding."""
    return -(-sizes[0] // ranks) * math.prod(sizes[1:]) if sizes else 1


def shard_sizes(shape: ModelShape, tensors: Tensors, ranks: int, folds: bool) -> list[int]:
    """Elements of the first rank's shard of each weight; `folds`: weights are, but not a tied embedding."""
    is_tied = shape.tied and shape.classes is None
    return [
        shard_size(
            folded(sizes, ranks) if folds and not (name == "embedding" and is_tied) else sizes,
            ranks,
        )
        for name, sizes in tensors.items()
    ]
