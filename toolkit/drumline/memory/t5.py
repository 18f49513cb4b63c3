"""T5's layers on a ledger: attention with learned biases of relative positions, and over another sequence.

Shapes: B samples, L tokens a row, T = B × L, H heads, h hidden size. A bias is [H, L, L]; with the padding of
the rows, [B, H, L, L].
"""

from collections.abc import Mapping

from drumline.architectures.shapes import ModelShape
from drumline.memory.ledger import Block, Gradient, Parameter, Value
from drumline.memory.norms import rms_norm
from drumline.memory.operators import FP32, INDEX, Operators
from drumline.memory.scores import batched_product, softmax


class Sources:
    """What all layers of a stack share: biases of positions and, in a decoder, what the encoder returned.

    `over_encoded`: the biases of attention over that, which are zeros without a gradient.
    """

    def __init__(
        self, biases: Value, encoded: Value | None = None, over_encoded: Value | None = None
    ):
        self.biases, self.encoded, self.over_encoded = biases, encoded, over_encoded


def position_biases(run: Operators, table: Parameter, heads: int, length: int) -> Value:
    """Biases of all pairs of positions, looked up in a table by their distance."""
    ledger, pairs, width = run.ledger, length * length, table.width
    distances = ledger.block(pairs, INDEX)
    weight = Value(None, table.elements, width, table.source)
    return ledger.make(
        pairs * heads,
        width,
        [weight],
        lambda g: [ledger.block(table.elements, width)],
        (distances,),
    )


def t5_layer(
    run: Operators,
    shape: ModelShape,
    weights: Mapping[str, Parameter],
    norm_weight: Parameter,
    stream: Value,
    sizes: tuple[int, int],
    sources: Sources,
    is_eager: bool,
    dropout: float,
) -> Value:
    """One layer [T, h] -> [T, h]; `sizes`: samples and tokens of a row."""

    def normalised(value: Value) -> Value:
        return rms_norm(run, value, shape.hidden, norm_weight, multiplies_input=True)

    def attend(hidden: Value, source: Value, name: str, biases: Value, is_padded: bool) -> Value:
        q, k, v = (
            run.linear(value, weights[f"{name}{letter}"], shape.query_width)
            for letter, value in (("q", hidden), ("k", source), ("v", source))
        )
        out = _attention(run, shape, (q, k, v), biases, sizes, is_padded, is_eager, dropout)
        return run.linear(out, weights[f"{name}out"], shape.hidden)

    hidden = normalised(stream)
    is_decoder = sources.encoded is not None
    hidden = attend(hidden, hidden, "", sources.biases, is_padded=not is_decoder)
    stream = run.add(stream, run.dropout(hidden, dropout))
    if sources.encoded is not None:
        assert sources.over_encoded
        hidden = normalised(stream)
        hidden = attend(hidden, sources.encoded, "cross_", sources.over_encoded, is_padded=True)
        stream = run.add(stream, run.dropout(hidden, dropout))
    hidden = _feed_forward(run, shape, weights, normalised(stream), dropout)
    return run.add(stream, run.dropout(hidden, dropout))


def _feed_forward(
    run: Operators,
    shape: ModelShape,
    weights: Mapping[str, Parameter],
    hidden: Value,
    dropout: float,
) -> Value:
    down = weights["down"]
    if shape.structure.feed_forward == "gated":
        inner = run.activate(shape.activation, run.linear(hidden, weights["gate"], shape.ffn))
        inner = run.multiply(inner, run.linear(hidden, weights["up"], shape.ffn))
    else:
        inner = run.activate(shape.activation, run.linear(hidden, weights["up"], shape.ffn))
    inner = run.cast(run.dropout(inner, dropout), down.width)  # to the dtype of the weight itself
    return run.linear(inner, down, shape.hidden)


def _attention(
    run: Operators,
    shape: ModelShape,
    projected: tuple[Value, Value, Value],
    biases: Value,
    sizes: tuple[int, int],
    is_padded: bool,
    is_eager: bool,
    dropout: float,
) -> Value:
    """Attention with biases; fused kernels get them as a mask, of which T5 keeps one for each layer."""
    samples, length = sizes
    square = shape.heads * length * length
    if is_eager:
        return _written_out(run, projected, biases, samples * square, dropout)
    mask = _chosen(run, biases, square * (samples if is_padded else 1))
    query, key, value, mask = (run.cast(v, run.low or v.width) for v in (*projected, mask))
    ledger, width = run.ledger, query.width
    lse = run.saved_block(shape.heads * samples * length, FP32)
    elements = [part.elements for part in (query, key, value, mask)]
    needs_mask = mask.source is not None

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        results: list[Block | None] = [ledger.block(size, width) for size in elements[:3]]
        results.append(ledger.block(elements[3], width) if needs_mask else None)
        held = [ledger.block(lse.elements, FP32)]
        if width < FP32:
            held.append(ledger.block(elements[0], FP32))
        held.clear()
        return results

    keeps = (query.block, key.block, value.block, lse, mask.block)
    return run.product(
        elements[2], width, [query, key, value, mask], rule, keeps, keeps_itself=True
    )


def _chosen(run: Operators, biases: Value, elements: float) -> Value:
    """The biases where a token may look, else the least number."""
    ledger, before, width = run.ledger, biases.elements, biases.width

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        whole = ledger.block(elements, width)
        return [ledger.block(before, width) if before < elements else whole]

    return ledger.make(elements, width, [biases], rule)


def _written_out(
    run: Operators,
    projected: tuple[Value, Value, Value],
    biases: Value,
    scores: float,
    dropout: float,
) -> Value:
    query, key, value = projected
    weights = run.scale(batched_product(run, query, key, scores))
    weights = run.add_broadcast(weights, biases)
    weights = run.shift_by_constant(weights, query.width)
    weights = run.dropout(softmax(run, weights, FP32 if run.low else weights.width), dropout)
    out = batched_product(run, weights, value, query.elements)
    run.attention_weights = weights
    return run.copy(out)
