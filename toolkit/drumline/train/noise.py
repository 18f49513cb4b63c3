"""Squared norms of the gradients of micro-batches, for the gradient noise scale (`plan/noise.py`).

Where a rank sees its own gradient before it is exchanged (one process, DDP, DeepSpeed), hooks on the
parameters measure every micro-batch of every rank. FSDP2 hands out gradients only when they are reduced and
sharded, so there the first micro-batch of all ranks is measured, once it is in.
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
    """Asked around every micro-batch; `measured` is summed over ranks with the step's loss."""

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Its forward is next."""

    def after(self, number: int, step: Step) -> None:
        """Its backward is done."""

    def measured(self) -> Tensor | None:
        """This rank's part of Q, n and w of the step: float32 [3]; begins the next."""


class NoMeter:
    """Nothing is measured."""

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Nothing."""

    def after(self, number: int, step: Step) -> None:
        """Nothing."""

    def measured(self) -> None:
        """Nothing."""


class HookMeter:
    """Every micro-batch of this rank, by hooks that see a parameter's gradient before it is added up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._factor = self._groups = self._weight = 0.0
        self._q = torch.zeros((), device=engine.device)
        for parameter in engine.module.parameters():
            parameter.register_hook(self._add)

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """What one squared norm counts: backward runs on the loss × G·scale/W."""
        self._factor = 0.0
        if micro_batch.weight:
            scale = self._engine.scaler.scale if self._engine.scaler else 1.0
            unscaled = step.weight / (self._engine.averaging_ranks * scale)
            self._factor = unscaled**2 / micro_batch.weight
            self._groups += 1
            self._weight += micro_batch.weight

    def after(self, number: int, step: Step) -> None:
        """Whatever comes before the next micro-batch does not count."""
        self._factor = 0.0

    def measured(self) -> Tensor:
        """Q, n, w of this rank's micro-batches."""
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
    """The first micro-batch of all ranks together, from the shards that this rank holds of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._found: Tensor | None = None

    def before(self, micro_batch: MicroBatch, step: Step) -> None:
        """Nothing: its gradient is looked at afterwards."""

    def after(self, number: int, step: Step) -> None:
        """Of the first of several; a step with one has nothing to be compared with."""
        if number > 1 or len(step.micro_batches) == 1:
            return
        scale = self._engine.scaler.scale if self._engine.scaler else 1.0
        gradients = [_local(p.grad) for p in self._engine.module.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        weight = step.first_weight
        q = torch.stack(norms).square().sum() * (step.weight / scale) ** 2 / weight
        own = [1.0, weight] if self._engine.rank == 0 else [0.0, 0.0]
        self._found = torch.stack([q, *(on_device(number, q.device) for number in own)])

    def measured(self) -> Tensor:
        """Q of the shards; n and w are told by the first rank."""
        found, self._found = self._found, None
        return torch.zeros(3, device=self._engine.device) if found is None else found


def build_meter(plan: Plan, engine: Engine) -> NoiseMeter:
    """What the recipe asks for and the strategy allows."""
    if not plan.recipe.logging.noise_scale:
        return NoMeter()
    return ShardMeter(engine) if plan.recipe.strategy.name == "fsdp" else HookMeter(engine)


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
