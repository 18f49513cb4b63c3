"""The table of optimizers: their states, kernels and strategies; planning and training read it. Pure.

To add one: a row here, its builder in `train/optimizers.py`, its name in `recipe/schema.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import trained_parameters, weights_of
from drumline.errors import PlanError
from drumline.memory.load import EIGHT_BIT_AT_ONCE, EMA_BYTES, StateSize
from drumline.recipe.precision import find_precision
from drumline.recipe.schema import Optimizer, Recipe


@dataclass(frozen=True)
class OptimizerRule:
    """Properties of one optimizer.

    `states`: sizes of its state tensors, given the bytes of a stored weight (scalars such as a step count are
    left out); None if they are not known.
    `kernels`: torch's implementations, the preferred one first; empty if there is no choice.
    `sharded_kernels`: those that support FSDP2's sharded tensors.
    `scratch`: whether the foreach kernel allocates a temporary as large as each parameter; its argument
    `decays` is whether weight decay is on. `scratch_of_largest`: how many fp32 tensors as large as the
    rank's largest a step allocates, and `scratch_at_most` the most elements of each, if there is a limit;
    `gathers`: of whole matrices, which it gathers.
    `strategies`: the strategies that it supports. `is_elementwise`: whether the update of an element depends
    on that element alone, so that a weight may have another shape while it is trained. `defaults`: of its
    keys, where they are not the schema's.
    """

    states: Callable[[Optimizer, int], tuple[StateSize, ...] | None]
    kernels: tuple[str, ...] = ("fused", "foreach")
    sharded_kernels: tuple[str, ...] = ("fused", "foreach")
    scratch: Callable[[bool], bool] = lambda decays: False
    scratch_of_largest: int = 0
    scratch_at_most: int | None = None
    gathers: bool = False
    strategies: tuple[str, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    is_elementwise: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)

    def kernels_for(self, strategy: str) -> tuple[str, ...]:
        """The implementations that a strategy supports, the preferred one first."""
        return self.sharded_kernels if strategy == "fsdp" else self.kernels


def _two_moments(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    return (StateSize.uniform(width),) * 2


def _one_moment(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    return (StateSize.uniform(width),)


def _momentum(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    return (StateSize.uniform(width),) if spec.momentum > 0 else ()


def _as_stated(spec: Optimizer, width: int) -> tuple[StateSize, ...] | None:
    return None if spec.states is None else (StateSize.uniform(width),) * spec.states


def _eight_bits(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    """A byte, and a scale of 4 bytes for 256 values; vectors keep fp32."""
    byte = 1 + 4 / 256
    return (StateSize(matrix=byte, outer=byte, vector=width),) * 2


def _of_muon(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    """The momentum of matrices in the layers; two moments of all else."""
    return StateSize.uniform(width), StateSize(matrix=0, outer=width, vector=width)


def _rows_and_columns(spec: Optimizer, width: int) -> tuple[StateSize, ...]:
    """Row and column sums of a matrix (Shazeer and Stern 2018), the second moment of a vector."""
    return (StateSize(matrix=0, outer=0, vector=width, per_row=width, per_column=width),)


_WHOLE_ROWS = ("ddp", "fsdp")
"""Strategies that keep the rows of a matrix whole; DeepSpeed's flat partitions do not."""

_ADAM = OptimizerRule(
    states=_two_moments, scratch=lambda decays: True
)  # scratch: the square root of the second moment
OPTIMIZERS: dict[str, OptimizerRule] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": OptimizerRule(
        states=_momentum,
        sharded_kernels=("foreach",),  # torch has no fused sgd for sharded tensors
        scratch=lambda decays: decays,  # a copy of the gradient, to which weight decay is added
    ),
    "adamw_8bit": OptimizerRule(
        states=_eight_bits,
        kernels=(),
        sharded_kernels=(),
        scratch_of_largest=7,
        scratch_at_most=EIGHT_BIT_AT_ONCE,
        strategies=_WHOLE_ROWS,
        is_elementwise=False,
    ),
    "adafactor": OptimizerRule(  # torch's needs whole tensors
        states=_rows_and_columns,
        kernels=(),
        sharded_kernels=(),
        scratch_of_largest=2,
        strategies=("ddp",),
        is_elementwise=False,
    ),
    "lion": OptimizerRule(
        states=_one_moment,
        kernels=(),
        sharded_kernels=(),
        scratch_of_largest=1,
        defaults={"betas": [0.9, 0.99]},
    ),
    "muon": OptimizerRule(
        states=_of_muon,
        kernels=(),
        sharded_kernels=(),
        scratch_of_largest=6,
        gathers=True,
        strategies=_WHOLE_ROWS,
        is_elementwise=False,
        defaults={"momentum": 0.95, "betas": [0.9, 0.95]},
    ),
    "custom": OptimizerRule(
        states=_as_stated, kernels=(), sharded_kernels=(), is_elementwise=False
    ),
}


def rule_of(recipe: Recipe) -> OptimizerRule:
    """The row of the recipe's optimizer."""
    return OPTIMIZERS[recipe.optimizer.name]


def resolved_optimizer(recipe: Recipe) -> Optimizer:
    """The recipe's optimizer with its kernel chosen, and its own values for keys that are not stated.

    Raises PlanError if the strategy does not support the optimizer or the stated kernel.
    """
    spec, rule, strategy = recipe.optimizer, rule_of(recipe), recipe.strategy.name
    if strategy not in rule.strategies:
        raise PlanError(
            f"optimizer.name: {spec.name} does not go with strategy {strategy}. "
            f"Nearest: {', '.join(rule.strategies)}"
        )
    stated = spec.model_fields_set
    spec = spec.model_copy(update={k: v for k, v in rule.defaults.items() if k not in stated})
    kernels = rule.kernels_for(strategy)
    if spec.implementation is None:
        update: dict[str, Any] = {"implementation": kernels[0] if kernels else None}
        return spec.model_copy(update=update)
    if spec.implementation not in kernels:
        nearest = f"Nearest: {kernels[0]}" if kernels else "Nearest: leave it out"
        raise PlanError(
            f"optimizer.implementation: torch has no {spec.implementation} {spec.name} for strategy "
            f"{strategy}. {nearest}"
        )
    return spec


def saved_bytes(recipe: Recipe, shape: ModelShape) -> int | None:
    """Bytes of weights, their average and optimizer state in a checkpoint; None if the last are not known.

    With an adapter it holds what is trained alone.
    """
    width = find_precision(recipe.precision, recipe.strategy.name).stored
    states = rule_of(recipe).states(recipe.optimizer, width)
    if states is None:
        return None
    weights = trained_parameters(shape) if recipe.model.adapter else shape.parameters
    kept = sum(
        run.number * state.bytes_of(sizes, run.is_layer)
        for run in weights_of(shape, is_frozen=False)
        for sizes in run.tensors.values()
        for state in states
    )
    averages = EMA_BYTES * trained_parameters(shape) if recipe.ema else 0
    return width * weights + averages + int(kept)


def frozen_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Of `saved_bytes`, those of weights that are not trained: a run writes them once."""
    if recipe.model.adapter:
        return 0
    width = find_precision(recipe.precision, recipe.strategy.name).stored
    return width * (shape.parameters - trained_parameters(shape))
