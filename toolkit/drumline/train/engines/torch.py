"""The plain torch engine: one process, DDP, or FSDP2 (sharded over all ranks or within each node)."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from drumline.checkpoint.boxes import boxes_of_range
from drumline.data.dataset_manifest import DatasetManifest
from drumline.plan.model import Plan
from drumline.plan.optimizers import rule_of
from drumline.train.compiling import compile_module
from drumline.train.engines.base import Engine
from drumline.train.models import ModelBuilder, has_batchnorm
from drumline.train.models.blocks import tied_blocks
from drumline.train.models.builder import Progress, ignore_progress
from drumline.train.models.folding import (
    fold_weights,
    original_name,
    shared_weights,
    unfolded_shapes,
)
from drumline.train.objectives import ObjectiveModule, build_objective
from drumline.train.optimizers import build_optimizer
from drumline.train.tensor_shard import TensorShard


class TorchEngine(Engine):
    """Wraps the training module in DDP or FSDP2; with one rank and no FSDP2 it stays unwrapped.

    `dtype` overrides the recipe's parameter dtype, for checks in fp64.
    """

    def __init__(
        self,
        plan: Plan,
        manifest: DatasetManifest,
        device: torch.device,
        dtype: torch.dtype | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        super().__init__(plan, device)
        recipe = plan.recipe
        self._sharded = recipe.strategy.name == "fsdp"
        builder = ModelBuilder(recipe, manifest, device, dtype, progress)
        self.notes = builder.notes
        model = self._shard(builder) if self._sharded else builder.whole()
        self._add_noise(model, manifest)
        self.module = ObjectiveModule(model, build_objective(recipe))
        self.has_batchnorm = has_batchnorm(model)
        self.wrapped = self._wrap()
        self._parameters = {  # kept here: under FSDP2 a forward can leave unsharded ones in the module
            original_name(name.removeprefix("model.")): parameter
            for name, parameter in self.module.named_parameters()
        }
        self._unfolded = unfolded_shapes(self.module.model)
        self.optimizer = build_optimizer(self.module, recipe)
        self._allocate_optimizer_state()
        self._begin_ema()

    def _shard(self, builder: ModelBuilder) -> nn.Module:
        """The model with its blocks sharded; what is outside them is sharded with the root, by `_wrap`."""
        folds = rule_of(self.plan.recipe).is_elementwise
        shared = shared_weights(builder.model)
        tied = tied_blocks(builder.model)
        for block in builder.blocks():
            if folds:
                fold_weights(block, self.mesh.shards, shared)
            if id(block) not in tied:
                fully_shard(block, **self._shard_options())
        model = builder.finish()
        if folds:
            fold_weights(model, self.mesh.shards, shared)
        return model

    def _shard_options(self) -> dict[str, Any]:
        """The mesh and the precision policy of FSDP2, the same for every block and the root."""
        if not hasattr(self, "_device_mesh"):
            self._device_mesh = self._make_mesh()
        policy = MixedPrecisionPolicy()
        if self._autocast:
            policy = MixedPrecisionPolicy(
                param_dtype=self._autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        is_freed_early = self.plan.recipe.strategy.reshard == "forward"
        return {
            "mesh": self._device_mesh,
            "mp_policy": policy,
            "reshard_after_forward": None if is_freed_early else False,  # None: all but the root
        }

    def _make_mesh(self) -> DeviceMesh:
        """A 1-D mesh of all ranks, or a 2-D mesh of replicas × shards."""
        if self.mesh.replicas == 1:
            return init_device_mesh(self.device.type, (self.mesh.shards,))
        shape = (self.mesh.replicas, self.mesh.shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard"))

    def _wrap(self) -> Any:
        """The module that a forward calls: compiled, then wrapped in DDP or made the FSDP2 root."""
        if self.plan.recipe.model.sync_batchnorm:
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        if self._sharded:
            fully_shard(self.module, **self._shard_options())
        if self.plan.recipe.model.compile:
            compile_module(self.module)
        if self._sharded or self.mesh.ranks == 1:
            return self.module
        return self._replicated_module()

    def _replicated_module(self) -> Any:
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.module,
            device_ids=devices,
            gradient_as_bucket_view=True,
            broadcast_buffers=self.has_batchnorm,
        )

    def clip(self, max_norm: float | None) -> Tensor:
        """Unscale and clip the gradient; returns its norm before clipping, float32 [], equal on all ranks."""
        return self._clip_gradients(max_norm)

    def _update(self, rate: float) -> None:
        """One optimizer update at this learning rate; clears the gradients."""
        self._set_rate(rate)
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Clear the gradients without an update.

        Under DDP they are zeroed in place and stay views of its buckets: new tensors would be a second copy
        until the last micro-batch.
        """
        self.optimizer.zero_grad(set_to_none=self._sharded or self.mesh.ranks == 1)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's gradient as the optimizer will use it; FSDP2 shards are gathered."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                yield name, gradient.view(self._unfolded.get(name, gradient.shape))

    def _after_evaluation(self) -> None:
        for module in self.module.modules() if self._sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def state_shards(self) -> Iterator[tuple[str, TensorShard]]:
        """Weights, then optimizer tensors; ranks take turns in writing the replicated ones."""
        tensors: list[tuple[str, str, Any]] = [
            (f"model.{name}", name, weight.data) for name, weight in self._saved_parameters()
        ]
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for parameter, state in self.optimizer.state.items():
            name = names[id(parameter)]
            tensors += [
                (f"optimizer.{name}.{key}", name, value)
                for key, value in state.items()
                if isinstance(value, Tensor)
            ]
        for number, (stored, name, value) in enumerate(tensors):
            if isinstance(value, DTensor):
                yield stored, self._sharded_part(name, value)
            else:
                yield stored, self._replicated(value, number)

    def _sharded_part(self, name: str, value: DTensor) -> TensorShard:
        """This rank's FSDP2 shard, split along dimension 0 like torch.chunk; the first replica writes."""
        mesh = value.device_mesh
        shards, position = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        rows = value.shape[0] if value.ndim else 1
        start = min(rows, position * -(-rows // shards))
        first_replica = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        local = value.to_local()
        is_folded = value.shape == self._parameters[name].shape
        shape = tuple(self._unfolded.get(name, value.shape) if is_folded else value.shape)
        row = math.prod(value.shape[1:])
        return TensorShard(
            local,
            shape,
            boxes_of_range(shape, start * row, local.numel()),
            owned=first_replica and local.numel() > 0,
            copies=mesh.get_group(0) if mesh.ndim > 1 else None,
        )

    @contextlib.contextmanager
    def _reduce_gradients(self, last: bool) -> Iterator[None]:
        if self._sharded:
            strategy = self.plan.recipe.strategy
            if strategy.reshard == "step":
                self.module.set_reshard_after_backward(last)
            if strategy.reduce == "step":
                self.module.set_requires_gradient_sync(last)
            else:  # shards of gradients are accumulated; only their copies on other nodes wait
                self.module.set_requires_all_reduce(last)
            yield
        elif self.mesh.ranks > 1 and not last:
            with self.wrapped.no_sync():
                yield
        else:
            yield
