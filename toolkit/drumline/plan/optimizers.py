"""The table of optimizers: their states, kernels and strategies; planning and training read it. Pure.

To add one: a row here, its builder in `train/optimizers.py`, its name in `recipe/schema.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import trained_parameters
from drumline.errors import PlanError
from drumline.recipe.precision import find_precision
from drumline.recipe.schema import Optimizer, Recipe

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OptimizerRule:
    """Properties of one optimizer.

    `states`: maps a parameter's shape to the shapes of its optimizer state tensors, in the stored precision
    (scalars such as a step count are left out); None if they are not known.
    `kernels`: torch's implementations, the preferred one first; empty if there is no choice.
    `sharded_kernels`: those that support FSDP2's sharded tensors.
    `scratch`: whether the foreach kernel allocates a temporary as large as each parameter; its argument
    `decays` is whether weight decay is on.
    `strategies`: the strategies that it supports. `is_elementwise`: whether the update of an element depends
    on that element alone, so that a weight may have another shape while it is trained.
    """

    states: Callable[[Shape, Optimizer], list[Shape] | None]
    kernels: tuple[str, ...] = ("fused", "foreach")
    sharded_kernels: tuple[str, ...] = ("fused", "foreach")
    scratch: Callable[[bool], bool] = lambda decays: False
    strategies: tuple[str, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    is_elementwise: bool = True

    def state_count(self, spec: Optimizer) -> int | None:
        """Number of state tensors per parameter, each of the parameter's size; None if not known."""
        shapes = self.states((1, 1), spec)
        return None if shapes is None else len(shapes)

    def kernels_for(self, strategy: str) -> tuple[str, ...]:
        """The implementations that a strategy supports, the preferred one first."""
        return self.sharded_kernels if strategy == "fsdp" else self.kernels


def _two_moments(shape: Shape, spec: Optimizer) -> list[Shape]:
    return [shape, shape]


def _momentum(shape: Shape, spec: Optimizer) -> list[Shape]:
    return [shape] if spec.momentum > 0 else []


def _as_stated(shape: Shape, spec: Optimizer) -> list[Shape] | None:
    return None if spec.states is None else [shape] * spec.states


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
    "custom": OptimizerRule(
        states=_as_stated, kernels=(), sharded_kernels=(), is_elementwise=False
    ),
}


def rule_of(recipe: Recipe) -> OptimizerRule:
    """The row of the recipe's optimizer."""
    return OPTIMIZERS[recipe.optimizer.name]


def resolved_optimizer(recipe: Recipe) -> Optimizer:
    """The recipe's optimizer with its kernel chosen.

    Raises PlanError if the strategy does not support the optimizer or the stated kernel.
    """
    spec, rule, strategy = recipe.optimizer, rule_of(recipe), recipe.strategy.name
    if strategy not in rule.strategies:
        raise PlanError(
            f"optimizer.name: {spec.name} does not go with strategy {strategy}. "
            f"Nearest: {', '.join(rule.strategies)}"
        )
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
    """Bytes of weights and optimizer state in a checkpoint; None if the optimizer's are not known.

    With an adapter it holds what is trained alone.
    """
    count = rule_of(recipe).state_count(recipe.optimizer)
    if count is None:
        return None
    width = find_precision(recipe.precision, recipe.strategy.name).stored
    trained = trained_parameters(shape)
    weights = trained if recipe.model.adapter else shape.parameters
    return width * (weights + trained * count)
