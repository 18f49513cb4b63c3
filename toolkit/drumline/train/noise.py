"""Squared norms of the gradients of micro-batches, for the gradient noise scale (`plan/noise.py`).

With one process, DDP or DeepSpeed a rank sees its own gradient before it is reduced, so hooks on the
parameters measure every micro-batch of every rank. FSDP2 exposes gradients only after the reduce-scatter, so
there the first micro-batch of all ranks together is measured.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from drumline.plan.model import Plan
from drumline.train.batches import MicroBatch, Step
from drumline.train.engines.base import Engine
from drumline.train.step_reduce import on_device


class NoiseMeter(Protocol):
    """Called around every micro-batch; `measured` is summed over ranks in the step reduce."""

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Called before the forward of a micro-batch."""

    def after(self, number: int, step: Step) -> None:
        """Called after the backward of the micro-batch with this number, from 1."""

    def measured(self) -> Tensor | None:
        """This rank's part of Q, n and w of the step, float32 [3]; resets them for the next step."""


class NoMeter:
    """Measures nothing."""

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Do nothing."""

    def after(self, number: int, step: Step) -> None:
        """Do nothing."""

    def measured(self) -> None:
        """Return None."""


class HookMeter:
    """Measures every micro-batch of this rank, by hooks that see each gradient before it is accumulated."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._factor = self._groups = self._weight = 0.0
        self._q = torch.zeros((), device=engine.device)
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add)

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Set the factor of the squared norms: backward runs on the loss × G·scale/W."""
        self._factor = 0.0
        if micro_batch.weight:
            scale = self._engine.scaler.scale if self._engine.scaler else 1.0
            unscaled = step.weight / (self._engine.averaging_ranks * scale)
            self._factor = unscaled**2 / micro_batch.weight
            self._groups += 1
            self._weight += micro_batch.weight

    def after(self, number: int, step: Step) -> None:
        """Ignore gradients until the next micro-batch."""
        self._factor = 0.0

    def measured(self) -> Tensor:
        """Q, n and w of this rank's micro-batches, float32 [3]."""
        counts = [on_device(number, self._q.device) for number in (self._groups, self._weight)]
        found = torch.stack([self._q, *counts])
        self._q = torch.zeros_like(self._q)
        self._groups = self._weight = 0.0
        return found

    def _add(self, gradient: Tensor) -> None:
        if self._factor:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._q += self._factor * norm * norm


class ShardMeter:
    """Measures the first micro-batch of all ranks together, from this rank's shards of its gradient."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._found: Tensor | None = None

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Do nothing: the gradient is measured in `after`."""

    def after(self, number: int, step: Step) -> None:
        """Measure the first of several micro-batches; a step with only one gives no second group."""
        if number > 1 or len(step.micro_batches) == 1:
            return
        scale = self._engine.scaler.scale if self._engine.scaler else 1.0
        gradients = [_local(p.grad) for p in self._engine.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        weight = step.first_weight
        q = torch.stack(norms).square().sum() * (step.weight / scale) ** 2 / weight
        own = [1.0, weight] if self._engine.rank == 0 else [0.0, 0.0]
        self._found = torch.stack([q, *(on_device(number, q.device) for number in own)])

    def measured(self) -> Tensor:
        """Q of this rank's shards, float32 [3]; only rank 0 contributes n and w."""
        found, self._found = self._found, None
        return torch.zeros(3, device=self._engine.device) if found is None else found


def build_meter(plan: Plan, engine: Engine) -> NoiseMeter:
    """The meter for the recipe's strategy; `NoMeter` unless `logging.noise_scale` is on."""
    if not plan.recipe.logging.noise_scale:
        return NoMeter()
    return ShardMeter(engine) if plan.recipe.strategy.name == "fsdp" else HookMeter(engine)


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
