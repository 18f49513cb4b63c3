"""DeBERTa's disentangled attention on a ledger: scores of contents, and of contents with relative positions.

Shapes: B samples, L tokens a row, T = B × L, H heads, S = B × H × L² scores, P = 2 × span relative positions.
"""

from collections.abc import Mapping

from drumline.architectures.shapes import ModelShape, RelativePositions
from drumline.memory.ledger import Gradient, Parameter, Value
from drumline.memory.operators import FP32, INDEX, Operators
from drumline.memory.scores import batched_product, softmax


def disentangled_attention(
    run: Operators,
    shape: ModelShape,
    weights: Mapping[str, Parameter],
    hidden: Value,
    samples: int,
    length: int,
    distances: Value | None,
    dropout: float,
) -> Value:
    """Attention of [T, h] to itself; `distances`: the table of relative positions [P, h], if it has one."""
    h, ledger = shape.hidden, run.ledger
    scores = samples * shape.heads * length * length
    query, key, value = (_by_head(run, run.linear(hidden, weights[n], h)) for n in ("q", "k", "v"))
    found = batched_product(run, query, run.scale(key), scores)
    relative = None
    if distances and shape.relative:
        table = run.dropout(distances, dropout)
        relative = _relative_scores(
            run, shape.relative, weights, query, key, table, (samples, length, scores)
        )
        found = run.add(found, relative)
    allowed = ledger.block(samples * length * length, 1)
    outside = ledger.block(samples * length * length, 1)
    width = found.width
    found = ledger.make(scores, width, [found], lambda g: [ledger.block(scores, width)], (outside,))
    del outside
    chances = run.dropout(softmax(run, found, FP32 if run.low else width), dropout)
    context = batched_product(run, chances, value, hidden.elements)
    del relative, allowed
    return _by_head(run, context)


def _relative_scores(
    run: Operators,
    relative: RelativePositions,
    weights: Mapping[str, Parameter],
    query: Value,
    key: Value,
    table: Value,
    sizes: tuple[int, int, int],
) -> Value:
    """The scores [S] of contents with relative positions, of both kinds together."""
    samples, _, _ = sizes
    sides = {"c2p": (query, "k"), "p2c": (key, "q")}
    kinds = [kind for kind in sides if kind in relative.kinds]
    rows = {}
    for kind in reversed(kinds) if relative.shares_keys else kinds:
        weight = weights[sides[kind][1] if relative.shares_keys else kind]
        projected = _by_head(
            run, run.linear(table, weight, weight.elements / _width(table, relative))
        )
        rows[kind] = run.repeat(projected, projected.elements * samples)
    total: Value | None = None
    held = []
    for kind in kinds:
        picked = _picked(run, sides[kind][0], rows[kind], sizes, relative)
        held.append(picked)  # a local variable of transformers' code
        total = _added(run, total, run.scale(picked))
    assert total
    return total


def _added(run: Operators, total: Value | None, scores: Value) -> Value:
    """`total += scores`: in place, but the first time 0 + scores is a new tensor."""
    if total is None:
        return run.shift(scores)
    return run.ledger.wrap(
        total.block, scores.elements, total.width, [total, scores], lambda g: g * 2
    )


def _width(table: Value, relative: RelativePositions) -> float:
    return table.elements / (2 * relative.span)


def _picked(
    run: Operators,
    content: Value,
    positions: Value,
    sizes: tuple[int, int, int],
    relative: RelativePositions,
) -> Value:
    """Products of contents and positions [B, H, L, P], of which [S] are picked by distance."""
    ledger = run.ledger
    _, length, scores = sizes
    all_products = scores / length * 2 * relative.span
    products = batched_product(run, content, positions, all_products)
    shifted = ledger.block(length * length, INDEX)
    places = ledger.block(length * length, INDEX)
    del shifted
    width = products.width

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        return [ledger.block(all_products, width)]

    return ledger.make(scores, width, [products], rule, (products.block, places))


def _by_head(run: Operators, value: Value) -> Value:
    """A copy ordered by head; its gradient is copied back."""
    return run.scale(value)
