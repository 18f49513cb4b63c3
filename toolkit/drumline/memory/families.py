"""The layers of the known model families, in the order in which transformers' forward runs them.

A local variable keeps its tensor alive, so variables here have the same lifetimes as in transformers'
code; hence the `del` statements.
"""

import math
from dataclasses import dataclass

from drumline.architectures.shapes import ModelShape, layer_tensors
from drumline.memory.attention import Kernel
from drumline.memory.ledger import Parameter, Value
from drumline.memory.mixtures import experts, route
from drumline.memory.operators import Operators
from drumline.memory.scores import eager_attention, math_attention


@dataclass(frozen=True)
class Rows:
    """One micro-batch on one rank: `samples` rows of `length` tokens, its attention kernel and mask."""

    samples: int
    length: int
    kernel: Kernel
    is_masked: bool

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.samples * self.length


class Layer:
    """One transformer layer: its weights and its forward."""

    def __init__(self, shape: ModelShape, width: int) -> None:
        self.shape = shape
        tensors = layer_tensors(shape)
        self.weights = {
            name: Parameter(math.prod(sizes), width)
            for name, sizes in tensors.items()
            if len(sizes) > 1
        }
        vectors = sum(sizes[0] for sizes in tensors.values() if len(sizes) == 1)
        self.rest = Parameter(vectors, width)  # norms and biases

    def forward(self, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
        """Run the layer's forward on the ledger: [T, h] -> [T, h]."""
        out = _LAYERS[self.shape.family](self, run, rows, stream, dropout)
        run.attention_weights = None
        return out

    def all_weights(self) -> list[Parameter]:
        """Every parameter of the layer."""
        return [*self.weights.values(), self.rest]


def _gpt2(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    w, h = layer.weights, layer.shape.hidden
    residual = stream
    hidden = run.layer_norm(stream, h)
    attended = _gpt2_attention(layer, run, rows, hidden)
    attended = run.dropout(attended, dropout)
    hidden = run.add(attended, residual)
    residual = hidden
    hidden = run.layer_norm(hidden, h)
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


def _llama(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    shape = layer.shape
    residual = stream
    hidden = run.rms_norm(stream, shape.hidden, layer.rest.width)
    hidden = _llama_attention(layer, run, rows, hidden, residual.width)
    hidden = run.add(residual, hidden)
    residual = hidden
    hidden = run.rms_norm(hidden, shape.hidden, layer.rest.width)
    hidden = (_experts if shape.experts else _gated)(layer, run, rows, hidden)
    return run.add(residual, hidden)


def _llama_attention(
    layer: Layer, run: Operators, rows: Rows, hidden: Value, cosines: int
) -> Value:
    shape, w = layer.shape, layer.weights
    query = run.linear(hidden, w["q"], shape.query_width)
    if shape.has_qk_norm:
        query = run.rms_norm(query, shape.head_dim, layer.rest.width)
    key = run.linear(hidden, w["k"], shape.kv_width)
    if shape.has_qk_norm:
        key = run.rms_norm(key, shape.head_dim, layer.rest.width)
    value = run.linear(hidden, w["v"], shape.kv_width)
    query, key = run.rotate(query, cosines), run.rotate(key, cosines)
    out = _attend(layer, run, rows, query, key, value)
    return run.linear(out, w["out"], shape.hidden)


def _gated(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    """down(silu(gate(x)) · up(x))."""
    w, f = layer.weights, layer.shape.ffn
    gate = run.activate(layer.shape.activation, run.linear(hidden, w["gate"], f))
    return run.linear(
        run.multiply(gate, run.linear(hidden, w["up"], f)), w["down"], layer.shape.hidden
    )


def _experts(layer: Layer, run: Operators, rows: Rows, hidden: Value) -> Value:
    """Route every token to its `top_k` experts; rows are sorted by expert for grouped matrix products."""
    shape, w = layer.shape, layer.weights
    weights = route(run, run.linear(hidden, w["router"], shape.experts), rows.tokens, shape)
    return experts(run, shape, hidden, weights, w["gate_up"], w["down"])


def _bert(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """Post-norm layer: norm(x + f(x)) for attention and for the feed-forward part."""
    shape, w = layer.shape, layer.weights
    query = run.linear(stream, w["q"], shape.hidden)
    key = run.linear(stream, w["k"], shape.hidden)
    value = run.linear(stream, w["v"], shape.hidden)
    out = _attend(layer, run, rows, query, key, value)
    del query, key, value
    hidden = run.dropout(run.linear(out, w["out"], shape.hidden), dropout)
    del out
    attended = run.layer_norm(run.add(hidden, stream), shape.hidden)
    del hidden
    expanded = run.activate(shape.activation, run.linear(attended, w["up"], shape.ffn))
    hidden = run.dropout(run.linear(expanded, w["down"], shape.hidden), dropout)
    del expanded
    return run.layer_norm(run.add(hidden, attended), shape.hidden)


def _vit(layer: Layer, run: Operators, rows: Rows, stream: Value, dropout: float) -> Value:
    """Pre-norm layer with biases in every projection."""
    shape, w = layer.shape, layer.weights
    residual = stream
    hidden = run.layer_norm(stream, shape.hidden)
    hidden = _vit_attention(layer, run, rows, hidden)
    hidden = run.add(run.dropout(hidden, dropout), residual)
    residual = hidden
    hidden = run.layer_norm(hidden, shape.hidden)
    expanded = run.activate(shape.activation, run.linear(hidden, w["up"], shape.ffn))
    hidden = run.linear(expanded, w["down"], shape.hidden)
    del expanded
    return run.add(run.dropout(hidden, dropout), residual)


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
            key, value = (run.repeat(shared, query.elements) for shared in (key, value))
        mask = scores if rows.is_masked else 0
        return run.attention(query, key, value, heads * rows.tokens, mask, packed)
    written_out = eager_attention if rows.kernel == "eager" else math_attention
    return written_out(run, layer.shape, query, key, value, heads * scores, packed)


_LAYERS = {
    "gpt2": _gpt2,
    "llama": _llama,
    "bert": _bert,
    "vit": _vit,
}
