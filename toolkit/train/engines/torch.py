"""Plain torch: one process, DDP, and FSDP2 (sharded over all ranks, or within each node).

The engine knows ranks, wrapping and precision; it does not know schedules, cadences or files.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from toolkit.data.card import Card
from toolkit.plan.model import Plan
from toolkit.train.loss import LossModule
from toolkit.train.models import BATCHNORM, Skeleton, derived_seed, has_batchnorm
from toolkit.train.optimizers import build_optimizer
from toolkit.train.scaler import LossScaler

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Piece:
    """A rank's part of one state tensor of `shape`; `tensor` is local, of any shape.

    Its elements, in row-major order, are those from `start` on. `owned` is true on the one rank that
    writes them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int
    owned: bool


class TorchEngine:
    """The training module of one rank: micro-batches in, one optimizer step out.

    `dtype` overrides the recipe's type of parameters, for checks in fp64.
    """

    def __init__(
        self, plan: Plan, card: Card, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.plan, self.device = plan, device
        self.world, self.rank = plan.batch.gpus, dist.get_rank()
        recipe = plan.recipe
        self._sharded = recipe.strategy.name == "fsdp"
        self._autocast = AUTOCAST.get(recipe.precision)
        skeleton = Skeleton(recipe, card, dtype)
        model = self._shard(skeleton) if self._sharded else self._replicate(skeleton)
        self.module: Any = LossModule(model, recipe.data.task, recipe.loss.chunked)
        self.has_batchnorm = has_batchnorm(model)
        self.wrapped = self._wrap()
        self._parameters = {  # FSDP2's sharded ones, whatever state a forward leaves the module in
            name.removeprefix("model."): parameter
            for name, parameter in self.module.named_parameters()
        }
        self.optimizer = build_optimizer(self.module, recipe.optimizer)
        self._allocate_optimizer_state()
        self.scaler = LossScaler() if recipe.precision == "fp16" else None

    def _replicate(self, skeleton: Skeleton) -> nn.Module:
        for _ in skeleton.blocks():
            pass
        return skeleton.finish().to(self.device)

    def _shard(self, skeleton: Skeleton) -> nn.Module:
        for block in skeleton.blocks():
            fully_shard(block, **self._shard_options())
        return skeleton.finish()

    def _shard_options(self) -> dict[str, Any]:
        """The mesh and the precision policy of FSDP2, the same for every block and the root."""
        if not hasattr(self, "_mesh"):
            nodes = self.plan.batch.nodes
            if self.plan.recipe.strategy.shard == "node":
                self._mesh = init_device_mesh(
                    self.device.type,
                    (nodes, self.world // nodes),
                    mesh_dim_names=("node", "gpu"),
                )
            else:
                self._mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy()
        if self._autocast:
            policy = MixedPrecisionPolicy(
                param_dtype=self._autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        return {"mesh": self._mesh, "mp_policy": policy}

    def _wrap(self) -> Any:
        """The module whose call is a forward: compiled, then DDP or the FSDP2 root."""
        if self.plan.recipe.model.sync_batchnorm:
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        if self._sharded:
            fully_shard(self.module, **self._shard_options())
        if self.plan.recipe.model.compile:
            self.module.compile()
        if self._sharded or self.world == 1:
            return self.module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.module,
            device_ids=devices,
            gradient_as_bucket_view=True,
            broadcast_buffers=self.has_batchnorm,
        )

    def accumulate(self, tensors: dict[str, Tensor], first_slot: int, weight: float, *, step: int,
                   dummy: bool, last: bool,
                   before_backward: Callable[[], None] = lambda: None) -> Tensor:  # fmt: skip
        """Forward and backward of one micro-batch; gradients are reduced on the last one only.

        Backward runs on Σ·G/W, because DDP and FSDP average over the G ranks. Returns the
        undivided sum of losses, float32 [], on the device.
        """
        self._seed_dropout(step, first_slot)
        with self._reduce_gradients(last), self._frozen_batchnorm(dummy):
            with self._precision():
                total = self.wrapped(self._to_device(tensors))[0]
            scale = self.world / weight
            if self.scaler:
                scale *= self.scaler.scale
            before_backward()
            (total * scale).backward()
        return total.detach()

    def clip(self, max_norm: float | None) -> Tensor:
        """Unscale, measure the norm of the whole gradient, clip to it: float32 [], equal on all ranks."""
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

    def step(self, rate: float) -> None:
        """One optimizer update at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def warm_up(self, tensors: dict[str, Tensor], passes: int = 2) -> None:
        """Forward and backward of weight zero on the largest shape; leaves no trace in any state.

        They bring DDP's buckets to their final order, so that a resumed run is bitwise equal, and
        run out of memory before a real step does.
        """
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        for _ in range(passes):
            self.accumulate(tensors, 0, 1.0, step=0, dummy=True, last=True)
            self.zero_grad()
        with torch.no_grad():
            for name, value in self.module.named_buffers():
                value.copy_(buffers[name])

    @torch.no_grad()
    def evaluate(self, tensors: dict[str, Tensor]) -> Tensor:
        """Weighted sum of losses and count of right answers, float32 [2], on the device."""
        self.module.eval()
        try:
            with self._precision():
                return self.wrapped(self._to_device(tensors)).detach()
        finally:
            self.module.train()
            if self._sharded:
                self.module.reshard()

    def state_tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor of model and optimizer under a stable name, DTensors as they are."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for name, weight in self._parameters.items():
            yield f"model.{name}", weight.data
        for name, buffer in self.module.named_buffers():
            if self._is_persistent(name):
                yield f"buffer.{name.removeprefix('model.')}", buffer
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{names[id(parameter)]}.{key}", value

    def pieces(self) -> dict[str, Piece]:
        """This rank's part of every state tensor, for saving to or loading from a checkpoint."""
        result = {}
        self.agree_on_buffers()
        for number, (name, value) in enumerate(self.state_tensors()):
            if isinstance(value, DTensor):
                result[name] = self._sharded_piece(value)
            else:
                owner = number % self.world
                result[name] = Piece(value, tuple(value.shape), 0, owner == self.rank)
        return result

    @torch.no_grad()
    def agree_on_buffers(self) -> None:
        """Give every rank the first one's BatchNorm statistics, which are those that are saved."""
        if self.has_batchnorm and self.world > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)

    def _sharded_piece(self, value: DTensor) -> Piece:
        """FSDP2 shards dimension 0 as torch.chunk does; the first replica writes."""
        mesh = value.device_mesh
        shards, position = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        rows = value.shape[0] if value.ndim else 1
        start = min(rows, position * -(-rows // shards))
        first_replica = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        local = value.to_local()
        row = math.prod(value.shape[1:])
        return Piece(local, tuple(value.shape), start * row, first_replica and local.numel() > 0)

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """Make the optimizer's tensors exist, at zero, without moving a weight.

        A checkpoint then has something to be loaded into, and memory runs out now or never.
        """
        groups = self.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in self._parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for group, (rate, decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        self.zero_grad()

    def _is_persistent(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf not in self.module.get_submodule(path)._non_persistent_buffers_set

    def _seed_dropout(self, step: int, first_slot: int) -> None:
        """This device's generator alone: torch.manual_seed looks for every kind of device there is."""
        seed = derived_seed("step", self.plan.recipe.seed, step, first_slot)
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
    def _reduce_gradients(self, last: bool) -> Iterator[None]:
        """Let the ranks exchange gradients in this backward, or not."""
        if self._sharded:
            self.module.set_requires_gradient_sync(last)
            self.module.set_is_last_backward(last)
            yield
        elif self.world > 1 and not last:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def _frozen_batchnorm(self, dummy: bool) -> Iterator[None]:
        """A dummy row leaves BatchNorm's running statistics alone."""
        layers = [m for m in self.module.modules() if isinstance(m, BATCHNORM)] if dummy else []
        layers = [layer for layer in layers if not isinstance(layer, nn.SyncBatchNorm)]
        for layer in layers:
            layer.eval()
        yield
        for layer in layers:
            layer.train()
