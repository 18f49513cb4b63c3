"""The layers of the known model families, in the order in which transformers' forward runs them.

A local variable keeps its tensor alive, so variables here have the same lifetimes as in transformers'
code; hence the `del` statements.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from drumline.architectures.shapes import LoraShape, ModelShape, layer_tensors
from drumline.architectures.trained import low_rank
from drumline.memory.attention import Kernel
from drumline.memory.disentangled import disentangled_attention
from drumline.memory.latent import latent_projections
from drumline.memory.ledger import AdapterWeights, Parameter, Value
from drumline.memory.mixtures import experts, route
from drumline.memory.norms import layer_norm, layer_norm_unfused, rms_norm, times_weight
from drumline.memory.operators import FP32, Operators
from drumline.memory.scores import eager_attention, math_attention
from drumline.memory.t5 import Sources, t5_layer


@dataclass(frozen=True)
class Rows:
    """One micro-batch on one rank, as one layer sees it: `samples` rows of `length` tokens.

    `kernel`: of its attention, which `is_masked` or not; `is_rotated`: whether it has rotary positions.
    `distances`: DeBERTa's table of relative positions. `sources`: what T5's layers share.
    """

    samples: int
    length: int
    kernel: Kernel
    is_masked: bool
    is_rotated: bool = True
    distances: Value | None = None
    sources: Sources | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.samples * self.length


class Layer:
    """One transformer layer: its weights and its forward."""

    def __init__(
        self,
        shape: ModelShape,
        width: int,
        frozen_width: int,
        frozen: Collection[str] = (),
        lora: LoraShape | None = None,
        packed: Collection[str] = (),
    ) -> None:
        """`width` and `frozen_width`: bytes per element in the forward.

        `frozen`: what is not trained, `packed`: what of it is quantised.
        """
        self.shape, self.frozen, self._width, self._lora = shape, frozen, width, lora
        tensors = layer_tensors(shape)
        self.weights = {
            name: Parameter(
                math.prod(sizes),
                frozen_width if name in frozen else width,
                name in frozen,
                self._adapter(name, sizes),
                name in frozen and name in packed,
            )
            for name, sizes in tensors.items()
            if len(sizes) > 1
        }
        vectors = {name: sizes[0] for name, sizes in tensors.items() if len(sizes) == 1}
        trained = sum(size for name, size in vectors.items() if name not in frozen)
        if trained or not vectors:
            self.rest = Parameter(trained, width)  # norms and biases
        else:
            self.rest = Parameter(sum(vectors.values()), frozen_width, is_frozen=True)

    def _adapter(self, name: str, sizes: tuple[int, ...]) -> AdapterWeights | None:
        if self._lora is None or name not in self._lora.targets or len(sizes) != 2:
            return None
        inputs, rank, outputs = low_rank(self.shape, sizes, self._lora.rank)
        return AdapterWeights(
            Parameter(inputs * rank, self._width),
            Parameter(rank * outputs, self._width),
            rank,
            self._lora.dropout,
            Parameter(outputs, self._width) if self._lora.is_dora else None,
        )

    @property
    def is_trained(self) -> bool:
        """Whether any of its weights is."""
        return any(not weight.is_frozen for weight in self.all_weights())

    def forward(self, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
        """Run the layer's forward on the ledger: [T, h] -> [T, h]."""
        out = _LAYERS[self.shape.family](self, run, rows, stream, dropout)
        run.attention_weights = None
        return out

    def all_weights(self) -> list[Parameter]:
        """Every parameter of the layer, those of its adapter among them."""
        adapters = [w.adapter.all_weights() for w in self.weights.values() if w.adapter]
        return [*self.weights.values(), self.rest, *(part for own in adapters for part in own)]


def _gpt2(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    w, h = layer.weights, layer.shape.hidden
    residual = stream
    hidden = layer_norm(run, stream, h)
    attended = _gpt2_attention(layer, run, rows, hidden)
    attended = run.dropout(attended, dropout)
    hidden = run.add(attended, residual)
    residual = hidden
    hidden = layer_norm(run, hidden, h)
    expanded = run.activate(layer.shape.activation, run.linear(hidden, w["up"], layer.shape.ffn))
    expanded = run.linear(expanded, w["down"], h)
    expanded = run.dropout(expanded, dropout)
    return run.add(residual, expanded)


def _gpt2_attention(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    h = layer.shape.hidden
    packed = run.linear(hidden, layer.weights["qkv"], 3 * h)
    part = Value(packed.block, rows.tokens * h, packed.width, packed.source)
    out = _attend(layer, run, rows, part, part, part, run.gather_gradients(packed))
    return run.linear(out, layer.weights["out"], h)


def _decoder(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """A decoder layer of the structure in `architectures/structures.py`."""
    structure = layer.shape.structure
    if structure.order in ("parallel", "parallel_two_norms"):
        return _parallel(layer, run, rows, stream, dropout)
    order = structure.order
    residual = stream
    hidden = norm(layer, run, stream) if order in ("pre", "sandwich") else stream
    hidden = _attention(layer, run, rows, hidden, residual.width)
    if order in ("post", "sandwich"):
        hidden = norm(layer, run, hidden)
    hidden = run.add(residual, _scaled(layer, run, run.dropout(hidden, dropout)))
    residual = hidden
    if order != "post":
        hidden = norm(layer, run, hidden)
    hidden = (_experts if layer.shape.experts else _feed_forward)(layer, run, rows, hidden)
    if order in ("post", "sandwich"):
        hidden = norm(layer, run, hidden)
    return run.add(residual, _scaled(layer, run, run.dropout(hidden, dropout)))


def _parallel(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """Attention and feed-forward of the same input, both added to it."""
    hidden = norm(layer, run, stream)
    attended = run.dropout(_attention(layer, run, rows, hidden, stream.width), dropout)
    if layer.shape.structure.order == "parallel_two_norms":
        del hidden
        hidden = norm(layer, run, stream)
    expanded = run.dropout(_feed_forward(layer, run, rows, hidden), dropout)
    return run.add(run.add(expanded, attended), stream)


def norm(layer: Layer, run: Operators, value: Value, features: int = 0) -> Value:
    """The family's norm over the hidden width, or over `features`."""
    features = features or layer.shape.hidden
    kind = layer.shape.structure.norm
    if kind in ("layer", "layer_without_shift"):
        return layer_norm(run, value, features)
    if kind == "cohere":
        return layer_norm_unfused(run, value, features, layer.rest)
    return rms_norm(run, value, features, layer.rest, is_wide=kind == "rms_wide")


def _scaled(layer: Layer, run: Operators, value: Value) -> Value:
    return run.scale(value) if layer.shape.structure.scales_residual else value


def _attention(layer: Layer, run: Operators, rows: Rows, hidden: Value, cosines: int) -> Value:
    """Projections, norms of queries and keys, rotary positions, attention, output projection."""
    shape, w, structure = layer.shape, layer.weights, layer.shape.structure
    q, kv = shape.query_width, shape.kv_width
    query_features = key_features = shape.head_dim
    if structure.qk_norm == "full":
        query_features, key_features = q, kv
    if shape.latent:
        query, key, value = latent_projections(
            run, shape, shape.latent, w, layer.rest, hidden, cosines
        )
        out = _attend(layer, run, rows, query, key, value)
        return run.linear(out, w["out"], shape.hidden)
    if structure.packs_qkv:
        packed = run.linear(hidden, w["qkv"], q + 2 * kv)
        sizes = [rows.tokens * width for width in (q, kv, kv)]
        query, key, value = run.parts(packed, sizes, is_chunked=structure.packs_qkv == "chunks")
        del packed
    else:
        query = run.linear(hidden, w["q"], q)
        if structure.scales_query:
            query = run.scale(query)
        if structure.qk_norm:
            query = norm(layer, run, query, query_features)
        key = run.linear(hidden, w["k"], kv)
        if structure.qk_norm:
            key = norm(layer, run, key, key_features)
        value = run.linear(hidden, w["v"], kv)
    if rows.is_rotated:
        query, key = (_rotated(layer, run, v, cosines) for v in (query, key))
    out = _attend(layer, run, rows, query, key, value)
    if rows.is_rotated and structure.rotary == "joined" and rows.kernel in ("flash", "efficient"):
        # The joined query is ordered by head, and so is the output of a fused kernel.
        out = run.copy(out)
    return run.linear(out, w["out"], shape.hidden)


def _rotated(layer: Layer, run: Operators, value: Value, cosines: int) -> Value:
    shape = layer.shape
    if shape.structure.rotary == "wide":
        return run.cast(run.rotate(run.cast(value, FP32), FP32), value.width)
    if shape.structure.rotary == "full_wide":  # both terms are cast by themselves
        turned = run.scale_by_constant(run.cast(value, FP32), FP32)
        other = run.scale_by_constant(run.rotate_half(run.cast(value, FP32)), FP32)
        return run.cast(run.add(turned, other), value.width)
    if shape.structure.rotary == "joined":
        return run.rotate_part(value, cosines, shape.rotary_share)
    return run.rotate(value, cosines)


def _feed_forward(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    kind, w, shape = layer.shape.structure.feed_forward, layer.weights, layer.shape
    if kind == "gated":
        return _gated(layer, run, hidden)
    if kind == "plain":
        inner = run.activate(shape.activation, run.linear(hidden, w["up"], shape.ffn))
        return run.linear(inner, w["down"], shape.hidden)
    packed = run.linear(hidden, w["gate_up"], 2 * shape.ffn)
    half = rows.tokens * shape.ffn
    gate, up = run.parts(packed, [half, half], is_chunked=True)
    del packed
    return run.linear(
        run.multiply(up, run.activate(shape.activation, gate)), w["down"], shape.hidden
    )


def _gated(layer: Layer, run: Operators, hidden: Value, name: str = "", width: int = 0) -> Value:
    """down(silu(gate(x)) · up(x)); `name` and `width`: of other weights than the layer's own."""
    gate, up, down = (layer.weights[f"{name}{part}"] for part in ("gate", "up", "down"))
    f = width or layer.shape.ffn
    inner = run.activate(layer.shape.activation, run.linear(hidden, gate, f))
    return run.linear(run.multiply(inner, run.linear(hidden, up, f)), down, layer.shape.hidden)


def _experts(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    """Route every token to its `top_k` experts; rows are sorted by expert for grouped matrix products."""
    shape, w = layer.shape, layer.weights
    logits = run.linear(hidden, w["router"], shape.experts, is_wide=shape.latent is not None)
    weights = route(run, logits, rows.tokens, shape)
    out = experts(run, shape, hidden, weights, w["gate_up"], w["down"])
    if shape.shared_experts:
        out = run.add(out, _gated(layer, run, hidden, "shared_", shape.shared_experts))
    return out


def _bert(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """Post-norm layer: norm(x + f(x)) for attention and for the feed-forward part."""
    shape, w = layer.shape, layer.weights
    query = run.linear(stream, w["q"], shape.hidden)
    key = run.linear(stream, w["k"], shape.hidden)
    value = run.linear(stream, w["v"], shape.hidden)
    out = _attend(layer, run, rows, query, key, value)
    del query, key, value
    return _post_norm(layer, run, run.linear(out, w["out"], shape.hidden), stream, dropout)


def _t5(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    assert rows.sources
    return t5_layer(run, layer.shape, layer.weights, layer.rest, stream, (rows.samples, rows.length),
                    rows.sources, rows.kernel == "eager", dropout)  # fmt: skip


def _deberta(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """BERT's layer with disentangled attention."""
    shape, w = layer.shape, layer.weights
    out = disentangled_attention(
        run, shape, w, stream, rows.samples, rows.length, rows.distances, dropout
    )
    return _post_norm(layer, run, run.linear(out, w["out"], shape.hidden), stream, dropout)


def _post_norm(layer: Layer, run: Operators, hidden: Value, stream: Value, dropout: float) -> Value:
    """BERT's layer after attention: norms of sums with what went in."""
    shape, w = layer.shape, layer.weights
    if shape.drops_attention:
        hidden = run.dropout(hidden, dropout)
    attended = layer_norm(run, run.add(hidden, stream), shape.hidden)
    del hidden
    expanded = run.activate(shape.activation, run.linear(attended, w["up"], shape.ffn))
    hidden = run.dropout(run.linear(expanded, w["down"], shape.hidden), dropout)
    del expanded
    return layer_norm(run, run.add(hidden, attended), shape.hidden)


def _vit(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """Pre-norm layer with biases in every projection."""
    shape, w = layer.shape, layer.weights
    residual = stream
    hidden = layer_norm(run, stream, shape.hidden)
    hidden = _layer_scaled(layer, run, _vit_attention(layer, run, rows, hidden))
    hidden = run.add(run.dropout(hidden, dropout), residual)
    residual = hidden
    hidden = layer_norm(run, hidden, shape.hidden)
    expanded = run.activate(shape.activation, run.linear(hidden, w["up"], shape.ffn))
    hidden = run.linear(expanded, w["down"], shape.hidden)
    del expanded
    hidden = _layer_scaled(layer, run, hidden)
    return run.add(run.dropout(hidden, dropout), residual)


def _layer_scaled(layer: Layer, run: Operators, value: Value) -> Value:
    """DINOv2's LayerScale: times a vector."""
    return times_weight(run, value, layer.rest) if layer.shape.has_layer_scale else value


def _vit_attention(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    w, h = layer.weights, layer.shape.hidden
    query, key, value = (run.linear(hidden, w[name], h) for name in ("q", "k", "v"))
    return run.linear(_attend(layer, run, rows, query, key, value), w["out"], h)


def _attend(layer: Layer, run: Operators, rows: Rows, query: Value, key: Value, value: Value,
            packed: Value | None = None) -> Value:  # fmt: skip
    """Attention with the kernel in `rows.kernel`; `packed` is set if q, k and v are views of one tensor."""
    scores = rows.samples * rows.length * rows.length
    heads = layer.shape.heads
    if rows.kernel in ("flash", "efficient"):
        if rows.is_masked:
            key, value = run.repeat_heads(query, key, value)
        mask = scores if rows.is_masked else 0
        return run.attention(query, key, value, heads * rows.tokens, mask, packed)
    written_out = eager_attention if rows.kernel == "eager" else math_attention
    return written_out(run, layer.shape, query, key, value, heads * scores, packed)


_LAYERS = {
    "gpt2": _gpt2,
    "decoder": _decoder,
    "bert": _bert,
    "deberta": _deberta,
    "t5": _t5,
    "vit": _vit,
}
