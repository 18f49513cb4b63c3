"""Attention that materializes its B·H·S² scores, on a ledger: eager, and torch's math kernel."""

from drumline.architectures.shapes import ModelShape
from drumline.memory.ledger import Gradient, Value
from drumline.memory.operators import FP32, Operators


def eager_attention(run: Operators, shape: ModelShape, query: Value, key: Value, value: Value,
                    scores: float, packed: Value | None) -> Value:  # fmt: skip
    """Transformers' eager attention: scores, scale, mask, softmax, dropout, product with the values."""
    key, value = run.repeat_heads(query, key, value)
    low = run.low or query.width
    weights = batched_product(run, query, key, scores)
    weights = run.scale(weights)
    if shape.structure.caps_scores:
        weights = run.scale(run.pointwise(run.scale(weights), keeps_input=False, keeps_output=True))
    weights = run.shift_by_constant(weights, query.width)
    if shape.family in ("decoder", "vit"):  # softmax(…, fp32).to(…): scores live until the cast
        weights = run.cast(softmax(run, weights, FP32), query.width)
    else:
        weights = softmax(run, weights, FP32 if run.low else weights.width)
    if shape.family == "gpt2":  # BERT applies dropout in fp32, without this cast
        weights = run.cast(weights, query.width)
    weights = run.dropout(weights, shape.dropout)
    if packed is None:
        value = _apart(run, value)
    out = batched_product(run, weights, value, value.elements)
    run.attention_weights = weights  # returned with the output, so alive until the layer returns
    return run.cast(out, low)


def math_attention(run: Operators, shape: ModelShape, query: Value, key: Value, value: Value,
                   scores: float, packed: Value | None) -> Value:  # fmt: skip
    """Torch's math kernel: scales q and k by the root of the scale, and repeats shared heads."""
    query, key, value = (run.cast(v, run.low or v.width) for v in (query, key, value))
    query = run.scale(query)
    key, value = run.repeat_heads(query, key, value)
    key = run.scale(key)
    weights = batched_product(run, query, key, scores)
    weights = run.pointwise(weights, keeps_input=False, keeps_output=True)
    if packed is None:
        value = _apart(run, value)
    return batched_product(run, weights, value, value.elements)


def _apart(run: Operators, value: Value) -> Value:
    """A copy of what is a view of a packed tensor, for a product by head, which saves the copy only."""
    is_part = value.block is not None and value.block.elements > value.elements
    return run.copy(value) if is_part else value


def softmax(run: Operators, scores: Value, width: int) -> Value:
    """Softmax with a result of this width, which is saved."""
    return run.pointwise(scores, keeps_input=False, keeps_output=True, width=width)


def batched_product(run: Operators, one: Value, other: Value, elements: float) -> Value:
    """A batched matrix product: saves both inputs; backward allocates both gradients."""
    one, other = (run.cast(v, run.low or v.width) for v in (one, other))
    ledger, width, sizes = run.ledger, one.width, (one.elements, other.elements)

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        return [ledger.block(size, width) for size in sizes]

    return run.product(elements, width, [one, other], rule, (one.block, other.block))
