"""Norms on a ledger, fused or as the single operations that transformers runs. T tokens, h features."""

from drumline.memory.ledger import Gradient, Parameter, Value
from drumline.memory.operators import FP32, Operators


def layer_norm(run: Operators, value: Value, features: int) -> Value:
    """Fused layer norm, in fp32 under autocast: saves its input, and mean and rstd per token."""
    value = run.cast(value, FP32 if run.low else value.width)
    ledger, elements, width = run.ledger, value.elements, value.width
    moments = [ledger.block(elements / features, FP32) for _ in range(2)]
    return ledger.make(
        elements, width, [value], lambda g: [ledger.block(elements, width)],
        (value.block, *moments),
    )  # fmt: skip


def rms_norm(
    run: Operators,
    value: Value,
    features: int,
    weight: Parameter,
    is_wide: bool = False,
    multiplies_input: bool = False,
) -> Value:
    """Unfused, as in transformers: cast x to fp32, mean of x², x / rms, cast back, times a weight.

    `weight`: tells its width, and whether it is trained. `is_wide`: multiplied by the weight in fp32, then
    cast back. `multiplies_input`: x is divided as it is, and the result gets the dtype of the weight (T5).
    """
    width = value.width
    wide = run.cast(value, FP32)
    squares = run.power(wide)
    rows = wide.elements / features
    ledger, elements = run.ledger, wide.elements
    mean = ledger.make(rows, FP32, [squares], lambda g: [ledger.block(elements, FP32)])
    del squares
    rms = run.pointwise(mean, keeps_input=False, keeps_output=True)
    del mean
    normal = times_row(run, value if multiplies_input else wide, rms)
    del wide, rms
    if multiplies_input:
        return times_weight(run, run.cast(normal, weight.width), weight)
    if is_wide:
        return run.cast(times_weight(run, normal, weight, FP32), width)
    return times_weight(run, run.cast(normal, width), weight)


def layer_norm_unfused(run: Operators, value: Value, features: int, weight: Parameter) -> Value:
    """A LayerNorm of single operations in fp32: x less its mean, twice, over the root of the variance."""
    wide = run.cast(value, FP32)
    rows, elements, ledger = wide.elements / features, wide.elements, run.ledger

    def mean(of: Value) -> Value:
        return ledger.make(rows, FP32, [of], lambda g: [ledger.block(elements, FP32)])

    average = mean(wide)
    variance = mean(run.power(run.add_broadcast(wide, average)))
    root = run.pointwise(variance, keeps_input=False, keeps_output=True)
    normal = times_row(run, run.add_broadcast(wide, average), root)
    del wide, average, variance, root
    return run.cast(times_weight(run, normal, weight, FP32), value.width)


def times_row(run: Operators, value: Value, row: Value) -> Value:
    """X [T, h] × r [T, 1]; the gradient of r is a sum over a temporary [T, h] product."""
    ledger, elements, rows = run.ledger, value.elements, row.elements
    width = max(value.width, row.width)

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        result, product = ledger.block(elements, width), ledger.block(elements, width)
        del product
        return [result, ledger.block(rows, width)]

    return ledger.make(elements, width, [value, row], rule, (value.block, row.block))


def times_weight(run: Operators, value: Value, weight: Parameter, width: int = 0) -> Value:
    """X [T, h] × w [h], as if w had `width`; the gradient of w is a sum over a temporary [T, h] product."""
    ledger, elements, width = run.ledger, value.elements, max(value.width, width or weight.width)
    is_frozen = weight.is_frozen

    def rule(gradient: list[Gradient]) -> list[Gradient]:
        result = ledger.block(elements, width)
        product = None if is_frozen else ledger.block(elements, width)
        del product
        return [result]

    return ledger.make(elements, width, [value], rule, () if is_frozen else (value.block,))
