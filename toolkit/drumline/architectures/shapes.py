"""The shape of a known transformer: its widths and the shapes of all its weights. Pure."""

import math
from dataclasses import dataclass
from functools import cached_property

from drumline.architectures.structures import LLAMA, Pooling, Structure

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


@dataclass(frozen=True)
class RelativePositions:
    """DeBERTa's attention to relative positions: a table of 2 × `span` of them.

    `kinds`: c2p (from content to positions), p2c. `shares_keys`: positions use the projections of the
    content. `is_normed`: the table goes through a LayerNorm.
    """

    span: int
    kinds: tuple[str, ...]
    shares_keys: bool
    is_normed: bool


@dataclass(frozen=True)
class Latent:
    """DeepSeek's attention, whose keys and values come from a narrower, latent vector of `kv_rank`.

    `query_rank`: that of queries, None without one. Heads have `rotated` features with rotary positions,
    shared by all heads in keys, and values of `value_dim`.
    """

    query_rank: int | None
    kv_rank: int
    rotated: int
    value_dim: int


@dataclass(frozen=True)
class LoraShape:
    """Adapters of `rank` on the matrices of a layer that `targets` names."""

    rank: int
    targets: frozenset[str]
    is_dora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What of a model is not trained, by the names in `outer_tensors` and `layer_tensors`, and its adapter.

    `layers`: the frozen names of each layer, first to last. `quantization`: of frozen matrices in them.
    """

    outer: frozenset[str]
    layers: tuple[frozenset[str], ...]
    lora: LoraShape | None = None
    quantization: str = "none"


_MOST_PADDING = 1 / 64
"""Share of a weight that FSDP2 may pad before the weight is folded."""


@dataclass(frozen=True)
class ModelShape:
    """Widths of a transformer; sizes are numbers of elements, not bytes.

    `family`: the structure of its layers. `ffn`: the feed-forward width, with `experts` that of one expert.
    Each token is routed to `top_k` experts. `positions`: learned positions of a text model, of which no
    token takes `unused_positions`; None for rotary ones, and for images, which have `patches` + 1. `types`:
    token types of an encoder. `has_embedding_block`: its embeddings are a block like a layer, which FSDP2
    shards by itself. `drops_attention`: it has dropout after attention. `classes`: classes of a classifier,
    None for a language model; `pooling`: what their head reads. `patches`: patches per image, and
    `patch_inputs` the numbers in one; 0 for text. `has_class_token`: one more token than patches.
    `has_mask_token`: a weight that no classifier uses. `has_unused_pooler`: an attention over the patches
    whose result a classifier drops. `has_layer_scale`: the results of attention and feed-forward are
    multiplied by a vector. `relative`: of DeBERTa. `latent`: of DeepSeek. `shared_experts`: width of a
    feed-forward beside the experts. `crosses`: a layer that also attends to what an encoder returned;
    `buckets`: distances in the table of the first layer of T5's stacks. `segments`: layers of different
    shapes, each with the number of those in a row. `window`: sliding window in tokens; attention over
    longer rows is given a mask. `activation`: as in the config. `structure`: of a decoder's layers.
    `rotary_share`: share of a head's features with rotary positions. `windowed` and `rotated`: of each
    layer, whether it has the window and rotary positions; empty if all are alike. `trained`: what of it is
    trained, None for all.
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
    pooling: Pooling = "last"
    has_class_token: bool = True
    has_mask_token: bool = False
    has_unused_pooler: bool = False
    has_layer_scale: bool = False
    relative: RelativePositions | None = None
    latent: Latent | None = None
    shared_experts: int = 0
    crosses: bool = False
    buckets: int = 0
    segments: "tuple[tuple[ModelShape, int], ...]" = ()
    rotary_share: float = 1.0
    windowed: tuple[bool, ...] = ()
    rotated: tuple[bool, ...] = ()
    trained: Trained | None = None

    @property
    def query_width(self) -> int:
        """Output features of the query projection: heads × head_dim."""
        return self.heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Features of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @cached_property
    def layer_shapes(self) -> "tuple[tuple[ModelShape, int], ...]":
        """Runs of layers of one shape, in their order, each with the number of its layers."""
        return self.segments or ((self, self.layers),)

    @cached_property
    def layer_parameters(self) -> int:
        """Number of parameters of one layer of this shape."""
        return count(layer_tensors(self))

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        layers = sum(shape.layer_parameters * number for shape, number in self.layer_shapes)
        return layers + count(outer_tensors(self))

    @cached_property
    def active_in_layers(self) -> int:
        """Elements of the layers' matrices that a token is multiplied with; only `top_k` experts count."""
        return sum(shape._active_per_layer * number for shape, number in self.layer_shapes)

    @property
    def _active_per_layer(self) -> int:
        matrices = {
            n: math.prod(sizes) for n, sizes in layer_tensors(self).items() if len(sizes) > 1
        }
        for name in ("gate_up", "down") if self.experts else ():
            matrices[name] = matrices[name] // self.experts * self.top_k
        return sum(matrices.values())

    def tokens(self, sequence_length: int | None) -> int:
        """Tokens per sample: patches and the class token of an image, or the sequence length."""
        if self.patches:
            return self.patches + self.has_class_token
        assert sequence_length
        return sequence_length

    def flops_per_sample(self, sequence_length: int | None) -> int:
        """FLOPs of forward and backward for one sample.

        Per token: 6 × active matrix elements + 6 × layers × heads × (features of a key + of a value) × tokens
        (Chowdhery et al. 2022, PaLM, appendix B).
        """
        tokens = self.tokens(sequence_length)
        head = self.vocabulary * self.hidden if self.classes is None else 0
        matrices = self.active_in_layers + head
        attentions = sum((1 + shape.crosses) * number for shape, number in self.layer_shapes)
        attention = 6 * attentions * self.heads * (self.head_dim + self.value_dim) * tokens
        return (6 * matrices + attention) * tokens


def layer_tensors(shape: ModelShape) -> Tensors:
    """All weights of one layer."""
    h, f, q, kv = shape.hidden, shape.ffn, shape.query_width, shape.kv_width
    tensors: Tensors
    if shape.family == "gpt2":  # Conv1D keeps its weights transposed
        tensors = {"qkv": (h, 3 * h), "out": (h, h), "up": (h, f), "down": (f, h)}
        return tensors | {"qkv_bias": (3 * h,), "up_bias": (f,)} | _vectors(h, 6)
    if shape.latent:
        return _latent_tensors(shape, shape.latent) | _decoder_tensors(shape)
    if shape.structure.packs_qkv:
        tensors = {"qkv": (q + 2 * kv, h), "out": (h, q)}
    else:
        tensors = {"q": (q, h), "k": (kv, h), "v": (kv, h), "out": (h, q)}
    if shape.has_qkv_bias:
        tensors |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if shape.family == "decoder":
        return tensors | _decoder_tensors(shape)
    if shape.family == "t5":
        return tensors | _t5_tensors(shape)
    relative = shape.relative
    for name in relative.kinds if relative and not relative.shares_keys else ():
        tensors |= {name: (h, h), f"{name}_bias": (h,)}
    vectors = 6 + 2 * shape.has_layer_scale
    return tensors | {"up": (f, h), "down": (h, f), "up_bias": (f,)} | _vectors(h, vectors)


def _t5_tensors(shape: ModelShape) -> Tensors:
    """The weights of a T5 layer besides those of its self-attention."""
    h, f, q = shape.hidden, shape.ffn, shape.query_width
    tensors: Tensors = {"up": (f, h), "down": (h, f)}
    if shape.structure.feed_forward == "gated":
        tensors |= {"gate": (f, h)}
    if shape.crosses:
        tensors |= {f"cross_{name}": (q, h) for name in ("q", "k", "v")} | {"cross_out": (h, q)}
    if shape.buckets:
        tensors |= {"distances": (shape.buckets, shape.heads)}
    return tensors | _vectors(h, 2 + shape.crosses)


def _latent_tensors(shape: ModelShape, latent: Latent) -> Tensors:
    """The weights of DeepSeek's attention; `head_dim` is that of queries and keys."""
    h, heads, q = shape.hidden, shape.heads, shape.query_width
    tensors: Tensors = {"q": (q, h)}
    if latent.query_rank:
        rank = latent.query_rank
        tensors = {"q_down": (rank, h), "q_norm": (rank,), "q": (q, rank)}
    unrotated = shape.head_dim - latent.rotated
    return tensors | {
        "kv_down": (latent.kv_rank + latent.rotated, h),
        "kv_norm": (latent.kv_rank,),
        "kv": (heads * (unrotated + latent.value_dim), latent.kv_rank),
        "out": (h, heads * latent.value_dim),
    }


def _decoder_tensors(shape: ModelShape) -> Tensors:
    """A decoder layer's weights besides those before attention; packed weights replace separate ones."""
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
        if shape.shared_experts:
            s = shape.shared_experts
            tensors |= {"shared_gate": (s, h), "shared_up": (s, h), "shared_down": (h, s)}
    elif structure.feed_forward == "plain":
        tensors |= {"up": (f, h), "down": (h, f)}
        if shape.has_mlp_bias:
            tensors |= {"up_bias": (f,), "down_bias": (h,)}
    elif structure.feed_forward == "gated_packed":
        tensors |= {"gate_up": (2 * f, h), "down": (h, f)}
        if shape.has_mlp_bias:
            tensors |= {"gate_up_bias": (2 * f,), "down_bias": (h,)}
    else:
        tensors |= {"gate": (f, h), "up": (f, h), "down": (h, f)}
        if shape.has_mlp_bias:
            tensors |= {"gate_bias": (f,), "up_bias": (f,), "down_bias": (h,)}
    return tensors | _vectors(h, structure.norms * (1 + structure.has_shift))


def outer_tensors(shape: ModelShape) -> Tensors:
    """All weights outside the layers: embeddings, norms, pooler and head."""
    h, classes = shape.hidden, shape.classes
    tensors = _embeddings(shape) | _pooler(shape)
    if classes is not None:
        inputs = 2 * h if shape.pooling == "first_and_mean" else h
        tensors |= {"head": (classes, inputs)}
        if shape.pooling != "last":
            tensors |= {"class_bias": (classes,)}
    elif not shape.tied:
        tensors |= {"head": (shape.vocabulary, h)}
    if shape.has_head_bias and classes is None:
        tensors |= {"head_bias": (shape.vocabulary,)}
    return tensors


def _embeddings(shape: ModelShape) -> Tensors:
    """Embeddings, and the norms before the first layer and after the last one."""
    h, vectors = shape.hidden, 2
    tensors: Tensors
    if shape.patches:
        tensors = {"patch": (h, shape.patch_inputs)}
        if shape.has_class_token:
            tensors |= {"class": (1, 1, h), "positions": (1, shape.patches + 1, h)}
        else:
            tensors |= {"positions": (shape.patches, h)}
        if shape.has_mask_token:
            tensors |= {"mask": (1, h)}
        return tensors | _vectors(h, 3)
    tensors = {"embedding": (shape.vocabulary, h)}
    if shape.positions:
        tensors |= {"positions": (shape.positions, h)}
    if shape.types:
        tensors |= {"types": (shape.types, h)}
    if shape.family == "decoder" and not shape.structure.has_shift:
        vectors = 1 + shape.structure.has_embedding_norm
    if shape.relative:
        tensors |= {"distances": (2 * shape.relative.span, h)}
        vectors += 2 * shape.relative.is_normed
    return tensors | _vectors(h, vectors)


def _pooler(shape: ModelShape) -> Tensors:
    """The layer before a classifier's head, or one whose result is dropped."""
    h = shape.hidden
    if shape.has_unused_pooler:
        return {"probe": (1, 1, h), "pool_qkv": (3 * h, h), "pool_qkv_bias": (3 * h,), "pool_out": (h, h),
                "pool_up": (shape.ffn, h), "pool_up_bias": (shape.ffn,), "pool_down": (h, shape.ffn),
                **{f"pool_{name}": size for name, size in _vectors(h, 4).items()}}  # fmt: skip
    if shape.pooling in ("first_tanh", "first_gelu"):
        return {"pooler": (h, h), "pooler_bias": (h,)}
    if shape.pooling == "first_norm":
        return {"pooler": (h, h), "pooler_norm": (h,)}
    if shape.pooling == "vocabulary":
        return {"pooler": (h, h), "pooler_bias": (h,), "pooler_norm": (h,), "pooler_shift": (h,)}
    return {}


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
