"""What a classifier runs after its layers, on a ledger: pooling, another layer, the head and the loss.

Shapes: n samples, T tokens, h hidden size.
"""

from collections.abc import Mapping

from drumline.architectures.shapes import ModelShape
from drumline.memory.ledger import Gradient, Parameter, Value
from drumline.memory.norms import layer_norm
from drumline.memory.operators import FP32, Operators, token_loss


def class_loss(
    run: Operators, shape: ModelShape, weights: Mapping[str, Parameter], hidden: Value, samples: int
) -> Value:
    """The loss of a classifier, from the last hidden states [T, h]."""
    classes = shape.classes or 1
    if shape.pooling == "tokens":
        read = run.dropout(hidden, shape.dropout)
        logits = run.linear(read, weights["head"], classes)
        del read
        return token_loss(run, logits, hidden.elements / shape.hidden)
    if shape.pooling == "last":  # classifies every token, then picks the last one
        return token_loss(run, run.linear(hidden, weights["head"], classes), samples)
    dropped = (
        _unused_pooler(run, shape, weights, hidden, samples) if shape.has_unused_pooler else None
    )
    logits = run.linear(_pooled(run, shape, weights, hidden, samples), weights["head"], classes)
    del dropped
    return token_loss(run, logits, samples)


def transformed(
    run: Operators, shape: ModelShape, weights: Mapping[str, Parameter], hidden: Value
) -> Value:
    """What a masked model's output layer reads, [T, h]: a linear layer, its activation and a norm."""
    found = run.activate(shape.activation, run.linear(hidden, weights["pooler"], shape.hidden))
    return layer_norm(run, found, shape.hidden)


def _pooled(
    run: Operators, shape: ModelShape, weights: Mapping[str, Parameter], hidden: Value, samples: int
) -> Value:
    """The head's input [n, h], or [n, 2h]."""
    rows = samples * shape.hidden
    if shape.pooling == "mean":
        return _reduced(run, hidden, rows)
    if shape.pooling == "first_and_mean":
        first, mean = _slice(run, hidden, rows), _reduced(run, _slice(run, hidden, 0), rows)
        width, narrow = max(first.width, mean.width), first.width

        def split(gradient: list[Gradient]) -> list[Gradient]:
            return [gradient[0].view(rows), run.ledger.block(rows, narrow)]

        return run.ledger.make(2 * rows, width, [first, mean], split)
    first = _slice(run, hidden, rows)
    if shape.pooling == "first":
        return first
    pooled = run.linear(first, weights["pooler"], shape.hidden)
    pooled = run.activate("tanh" if shape.pooling == "first_tanh" else "gelu", pooled)
    if shape.pooling == "first_norm":
        pooled = layer_norm(run, pooled, shape.hidden)
    return run.dropout(pooled, shape.dropout)


def _slice(run: Operators, value: Value, elements: float) -> Value:
    """A view of some rows; its gradient is padded with zeros to the whole size."""
    ledger, whole, width = run.ledger, value.elements, value.width
    return ledger.wrap(
        value.block, elements or whole, width, [value], lambda g: [ledger.block(whole, width)]
    )


def _reduced(run: Operators, value: Value, elements: float) -> Value:
    """A mean over tokens, in fp32 under autocast; its gradient is divided into a tensor of the whole size."""
    ledger, whole = run.ledger, value.elements
    width = value.width
    return ledger.make(elements, width, [value], lambda g: [ledger.block(whole, width)])


def _unused_pooler(
    run: Operators, shape: ModelShape, weights: Mapping[str, Parameter], hidden: Value, samples: int
) -> Value:
    """SigLIP's attention of one probe over all patches; a classifier drops its result, but it is computed."""
    ledger, h, rows = run.ledger, shape.hidden, samples * shape.hidden
    probe = ledger.make(rows, weights["probe"].width, [Value(None, h, FP32, weights["probe"].source)],
                        lambda g: [ledger.block(h, FP32)])  # fmt: skip
    packed = run.linear(hidden, weights["pool_qkv"], 2 * h)
    pooled = run.linear(probe, weights["pool_out"], h)
    expanded = run.activate(shape.activation, run.linear(pooled, weights["pool_up"], shape.ffn))
    result = run.linear(expanded, weights["pool_down"], h)
    del packed
    return result
