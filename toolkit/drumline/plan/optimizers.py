"""What each optimizer keeps and can: the one table that resolve, memory, cost and engines read. Pure.

To add one: a row here, its builder in `train/optimizers.py`, its name in `recipe/schema.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.recipe.precision import PRECISIONS
from drumline.recipe.schema import Optimizer, Recipe

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OptimizerRule:
    """One optimizer.

    `states`: from a parameter's shape to the shapes of the tensors kept for it, in the stored precision
    (scalars such as a step count are left out); None where they are not known.
    `kernels`: torch's implementations of it, the preferred one first; empty where there is no choice.
    `sharded_kernels`: those that work on FSDP2's sharded tensors.
    `scratch`: whether its foreach kernel allocates a tensor as large as each parameter; `decays` says
    whether weight decay is on.
    """

    states: Callable[[Shape, Optimizer], list[Shape] | None]
    kernels: tuple[str, ...] = ("fused", "foreach")
    sharded_kernels: tuple[str, ...] = ("fused", "foreach")
    scratch: Callable[[bool], bool] = lambda decays: False
    strategies: tuple[str, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3")

    def state_count(self, spec: Optimizer) -> int | None:
        """How many tensors of a parameter's own size are kept for it; None where that is not known."""
        shapes = self.states((1, 1), spec)
        return None if shapes is None else len(shapes)

    def kernels_for(self, strategy: str) -> tuple[str, ...]:
        """The implementations that go with a strategy."""
        return self.sharded_kernels if strategy == "fsdp" else self.kernels


def _two_moments(shape: Shape, spec: Optimizer) -> list[Shape]:
    return [shape, shape]


def _momentum(shape: Shape, spec: Optimizer) -> list[Shape]:
    return [shape] if spec.momentum > 0 else []


def _as_stated(shape: Shape, spec: Optimizer) -> list[Shape] | None:
    return None if spec.states is None else [shape] * spec.states


_ADAM = OptimizerRule(
    states=_two_moments, scratch=lambda decays: True
)  # the root of the second moment
OPTIMIZERS: dict[str, OptimizerRule] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": OptimizerRule(
        states=_momentum,
        sharded_kernels=("foreach",),  # torch has no fused sgd for sharded tensors
        scratch=lambda decays: decays,  # a copy of the gradient that the decay is added to
    ),
    "custom": OptimizerRule(states=_as_stated, kernels=(), sharded_kernels=()),
}


def rule_of(recipe: Recipe) -> OptimizerRule:
    """The row of the recipe's optimizer."""
    return OPTIMIZERS[recipe.optimizer.name]


def resolved_optimizer(recipe: Recipe) -> Optimizer:
    """The recipe's optimizer with its kernel chosen; PlanError where it does not go with the strategy."""
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
    """Bytes of all weights and all optimizer state, as a checkpoint holds them; None where not known."""
    count = rule_of(recipe).state_count(recipe.optimizer)
    if count is None:
        return None
    return shape.parameters * PRECISIONS[recipe.precision].stored * (1 + count)
