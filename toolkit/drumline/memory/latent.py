"""DeepSeek's latent attention on a ledger: queries, keys and values from narrower vectors.

Shapes: T tokens, H heads of D features in queries and keys, of which R have rotary positions.
"""

from collections.abc import Mapping

from drumline.architectures.shapes import Latent, ModelShape
from drumline.memory.ledger import Gradient, Parameter, Value
from drumline.memory.norms import rms_norm
from drumline.memory.operators import FP32, Operators


def latent_projections(
    run: Operators,
    shape: ModelShape,
    latent: Latent,
    weights: Mapping[str, Parameter],
    norm_weight: Parameter,
    hidden: Value,
    cosines: int,
) -> tuple[Value, Value, Value]:
    """Queries and keys [T, H × D], and values; `cosines`: their bytes per element."""
    tokens = hidden.elements / shape.hidden
    rotated, plain = latent.rotated, shape.head_dim - latent.rotated
    query = hidden
    if latent.query_rank:
        query = run.linear(query, weights["q_down"], latent.query_rank)
        query = rms_norm(run, query, latent.query_rank, norm_weight)
    query = run.linear(query, weights["q"], shape.query_width)
    per_head = tokens * shape.heads
    query_plain, query_rotated = run.parts(
        query, [per_head * plain, per_head * rotated], is_chunked=True
    )
    compressed = run.linear(hidden, weights["kv_down"], latent.kv_rank + rotated)
    keys, key_rotated = run.parts(
        compressed, [tokens * latent.kv_rank, tokens * rotated], is_chunked=True
    )
    keys = rms_norm(run, keys, latent.kv_rank, norm_weight)
    turn = _turn_complex if shape.structure.rotary == "complex" else _turn_pairs
    query_rotated, key_rotated = (turn(run, v, cosines) for v in (query_rotated, key_rotated))
    query = _joined(run, query_plain, query_rotated)
    expanded = run.linear(keys, weights["kv"], shape.heads * (plain + latent.value_dim))
    key_plain, value = run.parts(
        expanded, [per_head * plain, per_head * latent.value_dim], is_chunked=True
    )
    return query, _filled(run, key_plain, key_rotated, per_head * shape.head_dim), value


def _turn_pairs(run: Operators, value: Value, cosines: int) -> Value:
    """Rotary positions of interleaved pairs: four products of half the features, joined."""
    ledger, elements, before = run.ledger, value.elements, value.width
    half = elements / 2

    def every_other() -> Value:
        return ledger.wrap(
            value.block, half, before, [value], lambda g: [ledger.block(elements, before)]
        )

    def sides(one: Value, other: Value) -> Value:
        return run.add(run.scale_by_constant(one, cosines), run.scale_by_constant(other, cosines))

    first, second = every_other(), every_other()
    real, imaginary = sides(first, second), sides(second, first)

    def split(gradient: list[Gradient]) -> list[Gradient]:
        return [gradient[0].view(half), gradient[0].view(half)]

    return ledger.make(elements, real.width, [real, imaginary], split)


def _turn_complex(run: Operators, value: Value, cosines: int) -> Value:
    """Rotary positions as a product of complex numbers, in fp32, cast back."""
    return run.cast(run.scale_by_constant(run.cast(value, FP32), FP32), value.width)


def _joined(run: Operators, plain: Value, rotated: Value) -> Value:
    """Both parts of the queries side by side, in the wider dtype."""
    width = max(plain.width, rotated.width)
    plain, rotated = run.cast(plain, width), run.cast(rotated, width)
    sizes = plain.elements, rotated.elements

    def split(gradient: list[Gradient]) -> list[Gradient]:
        return [gradient[0].view(size) for size in sizes]

    return run.ledger.make(sum(sizes), width, [plain, rotated], split)


def _filled(run: Operators, plain: Value, rotated: Value, elements: float) -> Value:
    """Keys, written in place from both parts; the rotated one is shared by all heads.

    In the backward each of the two writes copies the whole gradient.
    """
    ledger, width = run.ledger, plain.width
    block = ledger.block(elements, width)
    shared = rotated.elements

    def second_write(gradient: list[Gradient]) -> list[Gradient]:
        copied = ledger.block(elements, width)
        gradient.clear()
        return [copied, ledger.block(shared, width)]

    def first_write(gradient: list[Gradient]) -> list[Gradient]:
        copied = ledger.block(elements, width)
        gradient.clear()
        return [copied.view(plain.elements)]

    filled = ledger.wrap(block, elements, width, [plain], first_write)
    return ledger.wrap(block, elements, width, [filled, rotated], second_write)
