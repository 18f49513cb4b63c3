"""The interface of all engines: accumulate micro-batches, step the optimizer, expose state as tensor shards.

An engine handles ranks, wrapping and precision; schedules, save cadence and files belong to the loop.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from drumline.architectures.patterns import covering
from drumline.checkpoint.boxes import whole
from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision
from drumline.train.ema import Ema
from drumline.train.models import BATCHNORM, derived_seed
from drumline.train.models.embedding_noise import EmbeddingNoise
from drumline.train.objectives.base import baseline_of
from drumline.train.optimizers import set_rate
from drumline.train.scaler import LossScaler
from drumline.train.tensor_shard import TensorShard


class Engine:
    """The training module of one rank. Subclasses own wrapping, backward, and the optimizer.

    `module`: model and objective. `wrapped`: the wrapped module that a forward calls. `scaler`: the dynamic
    loss scale of fp16, else None. `notes`: what building the model found. `averaging_ranks`: the number of
    ranks over which gradients are averaged. `ema`: the average of the trained weights, and
    `noise`: that on embeddings, if there is one.
    """

    module: Any
    wrapped: Any
    optimizer: torch.optim.Optimizer
    has_batchnorm: bool
    _parameters: dict[str, nn.Parameter]

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.mesh = plan, device, plan.mesh
        self.rank, self.averaging_ranks = dist.get_rank(), plan.mesh.averaging_ranks
        self._autocast = autocast_dtype(plan)
        self.scaler = LossScaler() if plan.recipe.precision == "fp16" else None
        self.notes: list[str] = []
        self.ema: Ema | None = None
        self.noise: EmbeddingNoise | None = None

    def accumulate(self, tensors: dict[str, Tensor], first_slot: int, weight: float, *, step: int,
                   dummy: bool, last: bool,
                   before_backward: Callable[[], None] = lambda: None) -> Tensor:  # fmt: skip
        """Forward and backward of one micro-batch; `last` marks the gradient accumulation boundary.

        Backward runs on Σ·G/W, because engines average over G ranks. Returns the undivided sum of losses,
        float32 [], on the device; or float32 [1 + m + s], followed by numerators and denominators of the
        metrics, if the objective reports them in each step, and by the sums of a mixture's s sources.
        """
        self._seed_dropout(step, first_slot)
        moved = self._to_device(tensors)
        if self.noise:
            self.noise.begin(step, first_slot, moved["lengths"])
        with self._reduce_gradients(last), self._frozen_batchnorm(dummy):
            with self._precision():
                found = self.wrapped(moved)
                total = found[0]
            scale = self.averaging_ranks / weight
            if self.scaler:
                scale *= self.scaler.scale
            before_backward()
            self._backward(total * scale)
        if self.noise:
            self.noise.end()
        objective = self.module.objective
        if objective.reports_each_step:
            return found.detach()  # type: ignore[no-any-return]
        if "sources" not in tensors:
            return total.detach()
        return torch.cat([found[:1], found[1 + 2 * len(objective.metrics) :]]).detach()

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """Names of the metrics whose sums `accumulate` returns beside the loss."""
        objective = self.module.objective
        return objective.metrics if objective.reports_each_step else ()

    def measure_baseline(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Give the objective the number that all losses of a step share, if it has one; a collective.

        It is of the whole effective batch, of which these are this rank's part, and costs a forward of it.
        """
        baseline = baseline_of(self.module.objective)
        if baseline is None:
            return
        parts = [self.evaluate(tensors, "baseline_sums") for tensors in micro_batches]
        sums = torch.stack(parts).sum(dim=0)
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
        baseline.set_baseline(sums)

    def clip(self, max_norm: float | None) -> Tensor:
        """Unscale and clip the gradient; returns its norm before clipping, float32 [], equal on all ranks."""
        raise NotImplementedError

    def step(self, rate: float) -> None:
        """One optimizer update at this learning rate, and one of the averages; clears the gradients."""
        self._update(rate)
        if self.ema:
            self.ema.update()

    def _update(self, rate: float) -> None:
        """One optimizer update at this learning rate; clears the gradients."""
        raise NotImplementedError

    def skip(self) -> None:
        """Clear the gradients without an update."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The whole gradient of every parameter, after `clip` and before `step`; a collective."""
        raise NotImplementedError

    def state_shards(self) -> Iterator[tuple[str, TensorShard]]:
        """This rank's part of every tensor of model and optimizer, under a name that all engines share."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Update everything derived from the shards, after a checkpoint was loaded into them."""

    def warm_up(self, tensors: dict[str, Tensor], passes: int = 2) -> None:
        """Run dummy forwards and backwards of the largest shape, which leave the state unchanged.

        They bring DDP's buckets to their final order, so that a resumed run is bitwise equal, and surface
        out-of-memory errors before the first real step. Where something is held from one micro-batch to the
        next, only the last pass is the last of its step.
        """
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        for number in range(passes):
            if number:
                self._let_go_of_buckets()
            self.measure_baseline([tensors])
            last = number == passes - 1 or not self.holds_between_micro_batches
            self.accumulate(tensors, 0, 1.0, step=0, dummy=True, last=last)
            self.check_that_all_is_used()
            self.skip()
        with torch.no_grad():
            for name, value in self.module.named_buffers():
                value.copy_(buffers[name])

    @property
    def holds_between_micro_batches(self) -> bool:
        """Whether FSDP2 keeps whole weights or gradients from one micro-batch to the next."""
        strategy = self.plan.recipe.strategy
        keeps = "step" in (strategy.reshard, strategy.reduce)
        return keeps and self.plan.batch.accumulation > 1

    def _let_go_of_buckets(self) -> None:
        """Drop the gradients that are views of DDP's first buckets, which the next forward replaces.

        Else both sets of buckets are alive until the end of its backward.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            for parameter in self.module.parameters():
                parameter.grad = None

    def check_that_all_is_used(self) -> None:
        """PlanError where DDP would wait for gradients that never come: the loss does not use all weights."""
        if not isinstance(self.wrapped, DistributedDataParallel):
            return
        unused = [
            name.removeprefix("model.")
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if unused:
            names = [name.removeprefix("model.") for name, _ in self.module.named_parameters()]
            patterns = json.dumps(covering(set(unused), names))
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise PlanError(
                f"strategy.name: the loss does not use {', '.join(unused[:3])}{more}, and DDP waits for a "
                f"gradient of every weight. Nearest: strategy.name=fsdp, or model.frozen={patterns}"
            )

    @torch.no_grad()
    def evaluate(self, tensors: dict[str, Tensor], method: str = "sums") -> Tensor:
        """The objective's sums over a micro-batch, float32 [1 + 2·metrics], on the device.

        Or what another of its `method`s returns. Without dropout and gradient.
        """
        self.module.eval()
        try:
            with self._precision():
                return self.wrapped(self._to_device(tensors), method).detach()  # type: ignore[no-any-return]
        finally:
            self.module.train()
            self._after_evaluation()

    def shards(self) -> dict[str, TensorShard]:
        """`state_shards` and the persistent buffers, to save or load a checkpoint; a collective."""
        self.agree_on_buffers()
        frozen = {f"model.{n}" for n, p in self._parameters.items() if not p.requires_grad}
        result = {
            name: dataclasses.replace(shard, frozen=True) if name in frozen else shard
            for name, shard in self.state_shards()
        }
        if self.ema:
            result |= dict(self.ema.shards())
        for number, (name, buffer) in enumerate(self.module.named_buffers()):
            if self._is_persistent(name):
                key = f"buffer.{name.removeprefix('model.')}"
                result[key] = self._replicated(buffer, number)
        return result

    @torch.no_grad()
    def agree_on_buffers(self) -> None:
        """Broadcast rank 0's BatchNorm statistics, so that evaluation and checkpoints use the same ones."""
        if self.has_batchnorm and self.mesh.ranks > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)

    def parameters(self) -> Iterable[nn.Parameter]:
        """All parameters, under FSDP2 the sharded ones; the module may hold gathered ones."""
        return self._parameters.values()

    def _saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that checkpoints hold: with an adapter those that are trained, else all."""
        is_adapter = self.plan.recipe.model.adapter is not None
        for name, parameter in self._parameters.items():
            if parameter.requires_grad or not is_adapter:
                yield name, parameter

    def _add_noise(self, model: nn.Module, manifest: DatasetManifest) -> None:
        """Let the model's embeddings have noise, if the recipe says so."""
        recipe = self.plan.recipe
        longest = recipe.data.sequence_length or manifest.row_tokens
        if recipe.model.neftune_alpha is not None:
            assert longest
            alpha, seed = recipe.model.neftune_alpha, recipe.seed
            self.noise = EmbeddingNoise(model, alpha, seed, longest)

    def _begin_ema(self) -> None:
        """Begin the average of the trained weights, if the recipe has one."""
        spec = self.plan.recipe.ema
        if spec is None:
            return
        trained = {name for name, p in self._parameters.items() if p.requires_grad}
        weights = {
            name.removeprefix("model."): shard
            for name, shard in self.state_shards()
            if name.startswith("model.") and name.removeprefix("model.") in trained
        }
        self.ema = Ema(spec.decay, weights, self.loaded)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _reduce_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one backward; ranks all-reduce gradients only on the last micro-batch."""
        raise NotImplementedError

    def _after_evaluation(self) -> None:
        """Free parameters that evaluation has gathered."""

    def _replicated(self, value: Tensor, number: int) -> TensorShard:
        """The shard of a tensor that every rank holds whole; the writing rank depends on `number`."""
        owned = self.mesh.writer(number) == self.rank
        copies = dist.group.WORLD if self.mesh.ranks > 1 else None
        shape = tuple(value.shape)
        return TensorShard(value, shape, whole(shape), owned=owned, copies=copies)

    def _clip_gradients(self, max_norm: float | None) -> Tensor:
        """`clip` for gradients stored in `parameter.grad`, whole or as FSDP2 shards."""
        parameters = self._parameters.values()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.scaler:
            torch._foreach_mul_(gradients, 1.0 / self.scaler.scale)
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm.detach().float()

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """Allocate the optimizer's state tensors, at zero, without changing a weight.

        A checkpoint can then be loaded into them, and an out-of-memory error comes before training.
        """
        with self._without_update():
            for parameter in self._parameters.values():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rate(self, rate: float) -> None:
        set_rate(self.optimizer, rate)

    @contextlib.contextmanager
    def _without_update(self) -> Iterator[None]:
        """Context in which an optimizer step changes no weight; the optimizer state is zeroed on exit."""
        groups = self.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        yield
        for group, (rate, decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _is_persistent(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf not in self.module.get_submodule(path)._non_persistent_buffers_set

    def _seed_dropout(self, step: int, first_slot: int) -> None:
        """Seed only this device's generator, because torch.manual_seed seeds those of every device type.

        And numpy's, which models of speech draw their masks from.
        """
        seed = derived_seed("step", self.plan.recipe.seed, step, first_slot)
        np.random.seed(seed % 2**32)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)

    @contextlib.contextmanager
    def _frozen_batchnorm(self, dummy: bool) -> Iterator[None]:
        """Context in which a dummy micro-batch does not change BatchNorm's running statistics."""
        layers = [m for m in self.module.modules() if isinstance(m, BATCHNORM)] if dummy else []
        layers = [layer for layer in layers if not isinstance(layer, nn.SyncBatchNorm)]
        for layer in layers:
            layer.eval()
        yield
        for layer in layers:
            layer.train()


def autocast_dtype(plan: Plan) -> torch.dtype | None:
    """The dtype of matrix products under the plan's precision; None without autocast."""
    name = find_precision(plan.recipe.precision, plan.recipe.strategy.name).autocast
    return None if name is None else getattr(torch, name)  # type: ignore[no-any-return]
