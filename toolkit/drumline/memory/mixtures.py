"""Mixture-of-experts layers on a ledger, as in transformers' grouped implementation.

Shapes: T tokens, S = T × top_k rows, E experts, h hidden size, f intermediate size of an expert.
"""

from drumline.architectures.shapes import ModelShape
from drumline.memory.ledger import Gradient, Parameter, Value
from drumline.memory.norms import times_row
from drumline.memory.operators import FP32, INDEX, Operators


def route(run: Operators, logits: Value, tokens: float, shape: ModelShape) -> Value:
    """Routing weights [S]: softmax of the logits [T, E] in fp32, or their sigmoid; then top_k, normalised."""
    ledger, elements, kind = run.ledger, logits.elements, shape.architecture
    if kind == "mixtral":  # casts first; Qwen3-MoE calls softmax with dtype=float32
        logits = run.cast(logits, FP32)
    width = logits.width if kind == "deepseek_v3" else FP32
    chances = run.pointwise(logits, keeps_input=False, keeps_output=True, width=width)
    rows = tokens * shape.top_k
    numbers = ledger.block(rows, INDEX)
    weights = ledger.make(
        rows, width, [chances], lambda g: [ledger.block(elements, width)], (numbers,)
    )
    return run.cast(weights, logits.width) if kind == "qwen3_moe" else weights


def experts(run: Operators, shape: ModelShape, hidden: Value, weights: Value,
            gate_up: Parameter, down: Parameter) -> Value:  # fmt: skip
    """The experts' output [T, h].

    Sorts rows by expert, runs two grouped matrix products, applies the routing weights, restores the order
    of the rows and sums over top_k.
    """
    ledger, rows = run.ledger, weights.elements
    tokens, h, f = rows / shape.top_k, shape.hidden, shape.ffn
    wide = hidden.width
    order = ledger.block(rows, INDEX)
    places = ledger.block(rows, INDEX)
    chosen = _pick(run, hidden, rows * h, places.size)
    packed = _grouped(run, chosen, gate_up, rows * 2 * f)
    gate = run.activate(shape.activation, _half(run, packed))
    inner = run.multiply(gate, _half(run, packed))
    del packed, gate
    out = _grouped(run, inner, down, rows * h)
    del inner
    weighted = times_row(run, out, weights)
    back = _pick(run, weighted, rows * h, places.size)
    del weighted, order
    width = FP32 if run.low else back.width
    summed = ledger.make(tokens * h, width, [back], lambda g: g)  # the sum's gradient is an expand
    return run.cast(summed, wide)


def _pick(run: Operators, value: Value, elements: float, index_bytes: int) -> Value:
    """Select rows by index: saves the indices; backward accumulates into zeros of the input's size."""
    ledger, before, width = run.ledger, value.elements, value.width
    numbers = ledger.block(index_bytes, 1)
    return ledger.make(
        elements, width, [value], lambda g: [ledger.block(before, width)], (numbers,)
    )


def _half(run: Operators, packed: Value) -> Value:
    """A view of one half of [S, 2f]; its gradient is zero-padded to [S, 2f] and added to the other's."""
    ledger, elements, width = run.ledger, packed.elements, packed.width
    return ledger.wrap(
        packed.block, elements / 2, width, [packed], lambda g: [ledger.block(elements, width)]
    )


def _grouped(run: Operators, rows: Value, weight: Parameter, elements: float) -> Value:
    """A grouped matrix product; not on autocast's list, so rows are cast to the weight's dtype."""
    ledger, width = run.ledger, weight.width
    rows = run.cast(rows, width)
    table = Value(None, weight.elements, width, weight.source)
    before, weights = rows.elements, weight.elements
    for_input, for_weight = rows.source is not None, not weight.is_frozen

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        return [
            ledger.block(before, width) if for_input else None,
            ledger.block(weights, width) if for_weight else None,
        ]

    keeps = (rows.block,)
    return run.product(elements, width, [rows, table], rule, keeps)
