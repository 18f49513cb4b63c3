"""DeepSpeed: ZeRO stages 0 to 3 under drumline's loss weighting, clipping, schedule and checkpoints.

DeepSpeed averages over ranks and, by default, over micro-batches. Here backward runs on Σ·G/W without
DeepSpeed's scaling by gradient accumulation steps, and the engine sets the gradient accumulation boundary.
State is read and written in place, in the fp32 partitions that the optimizer updates.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import logger, safe_get_full_grad

from drumline.checkpoint.boxes import boxes_of_range, whole
from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import LaunchError
from drumline.plan.deepspeed import STAGES, deepspeed_config
from drumline.plan.model import Plan
from drumline.recipe.precision import find_precision
from drumline.train.compiling import compile_module
from drumline.train.engines.base import Engine
from drumline.train.models import ModelBuilder, has_batchnorm
from drumline.train.models.blocks import tied_blocks
from drumline.train.models.builder import Progress, ignore_progress
from drumline.train.objectives import ObjectiveModule, build_objective, model_input_names
from drumline.train.optimizers import build_optimizer
from drumline.train.tensor_shard import TensorShard

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for two minutes on a CPU
logger.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())  # metrics.jsonl has skips


@dataclasses.dataclass(frozen=True)
class _Part:
    """A rank's part of a parameter and of its optimizer state.

    `views`: flat views by optimizer state key, under None the weight. `start`: their first element in the
    whole tensor. `scalars`: state that the parameters of a group share.
    """

    views: dict[str | None, Tensor]
    start: int
    scalars: dict[str, Tensor]
    is_whole: bool = False


class DeepSpeedEngine(Engine):
    """Wraps the training module in DeepSpeed's engine of the same name."""

    def __init__(
        self,
        plan: Plan,
        manifest: DatasetManifest,
        device: torch.device,
        progress: Progress = ignore_progress,
    ) -> None:
        super().__init__(plan, device)
        recipe = plan.recipe
        self._stage = STAGES[recipe.strategy.name]
        self._numbers = find_precision(recipe.precision, recipe.strategy.name)
        self._config = deepspeed_config(plan)
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
        builder = ModelBuilder(recipe, manifest, device, progress=progress)
        self.notes = builder.notes
        tied = tied_blocks(builder.model)
        for block in builder.blocks():
            if id(block) not in tied:  # transformers ties weights by the size that they have
                self._partition(block)
        model = builder.finish()
        self._partition(model)
        self._add_noise(model, manifest)
        self.module = ObjectiveModule(model, build_objective(recipe))
        self.has_batchnorm = has_batchnorm(model)
        if recipe.model.compile:
            compile_module(self.module)
        self._parameters = {
            name.removeprefix("model."): parameter
            for name, parameter in self.module.named_parameters()
        }
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=build_optimizer(self.module, recipe),
            config=self._config,
            dist_init_required=False,
        )
        self.wrapped: Any = engine
        self._zero: Any = engine.optimizer if self._stage else None
        for owner in filter(None, (engine, self._zero)):  # drumline's own scaler checks all ranks
            owner.torch_autocast_z0_gradscaler = owner.torch_autocast_gradscaler = None
        self.optimizer = self._zero.optimizer if self._zero else engine.optimizer
        groups = self._zero.bit16_groups if self._zero and self._stage < 3 else []
        self._groups = {id(p): number for number, group in enumerate(groups) for p in group}
        self._norm: Any = None
        self._scale = 1.0
        self._check(engine)
        self._allocate_optimizer_state()
        self._begin_ema()

    def _check(self, engine: Any) -> None:
        found = (engine.dp_world_size, engine.global_rank, engine.zero_optimization_stage())
        planned = (self.mesh.data_ranks, self.rank, self._stage)
        if found != planned:
            raise LaunchError(
                f"DeepSpeed sees (ranks, rank, ZeRO stage) {found}, the plan names {planned}"
            )

    def _partition(self, block: nn.Module) -> None:
        """Under ZeRO-3, partition a newly made block over the ranks."""
        if self._stage == 3:
            dtype = getattr(torch, self._numbers.model)
            deepspeed.zero.Init(module=block, config_dict_or_path=self._config, dtype=dtype)

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of the whole unscaled gradient, float32 []; ZeRO clips during its step."""
        if self._zero is None:
            return self._clip_gradients(max_norm)
        if self._stage == 3:
            self._norm = combine_grad_norm_groups(type(self._zero)._get_norm_groups(self._zero))
        else:
            self._norm = type(self._zero).scaled_global_norm(self._zero)
        self._scale = self.scaler.scale if self.scaler else 1.0
        scaled = torch.as_tensor(self._norm, dtype=torch.float32, device=self.device).reshape(())
        return torch.where(scaled < 0, torch.inf, scaled / self._scale)  # -1: not finite

    def _update(self, rate: float) -> None:
        """One optimizer update at this learning rate; clears the gradients."""
        self._set_rate(rate)
        if self._zero is not None:
            self._step_with_norm(self._norm)
        else:
            self.wrapped.step()

    def skip(self) -> None:
        """Clear the gradients without an update, as ZeRO's step does when the norm is not finite."""
        if self._zero is not None:
            self._step_with_norm(torch.tensor(-1.0, device=self.device))
        else:
            self.wrapped.zero_grad()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's gradient, gathered from ZeRO's partitions and not yet clipped there."""
        for name, parameter in self._trainable():
            gradient = parameter.grad if self._stage == 0 else safe_get_full_grad(parameter)
            if gradient is not None:
                scale = self._scale if self._stage else 1.0
                yield name, gradient.view(getattr(parameter, "ds_shape", parameter.shape)) / scale

    def _step_with_norm(self, norm: Any) -> None:
        """Run ZeRO's step with a given norm: the one that `clip` measured, or -1 to make it skip the update.

        The step divides gradients by the loss scale, so it is set only here: `accumulate` has already scaled
        the loss, and DeepSpeed's backward must not scale it again.
        """
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [norm]
        else:
            self._zero.scaled_global_norm = lambda norm_type=2: norm
        self._zero.loss_scaler.cur_scale = self._scale
        self.wrapped.step()
        self._zero.loss_scaler.cur_scale = 1.0

    def _backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def _reduce_gradients(self, last: bool) -> Iterator[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the device; the model's inputs in its weights' dtype, unless autocast casts them."""
        moved = super()._to_device(tensors)
        if self._numbers.has_masters:
            for name in model_input_names(moved):
                if moved[name].is_floating_point():
                    moved[name] = moved[name].to(getattr(torch, self._numbers.model))
        return moved

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # DeepSpeed's torch_autocast does it

    def state_shards(self) -> Iterator[tuple[str, TensorShard]]:
        """Views of this rank's part of weights and optimizer state; under ZeRO, of its fp32 partitions."""
        for number, (name, parameter) in enumerate(self._saved_parameters()):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            part = self._part_of(parameter)
            for key, view in part.views.items():
                stored = f"model.{name}" if key is None else f"optimizer.{name}.{key}"
                if part.is_whole:
                    shard = self._replicated(view, number)
                    yield stored, dataclasses.replace(shard, shape=shape, boxes=whole(shape))
                else:
                    boxes = boxes_of_range(shape, part.start, view.numel())
                    yield stored, TensorShard(view, shape, boxes, owned=view.numel() > 0)
            for key, value in part.scalars.items():
                yield f"optimizer.{name}.{key}", self._replicated(value, number)

    def _trainable(self) -> Iterator[tuple[str, Any]]:
        return ((name, p) for name, p in self._parameters.items() if p.requires_grad)

    def _part_of(self, parameter: Any) -> "_Part":
        """This rank's part of a parameter and of its optimizer state."""
        if self._stage == 0 or (self._stage < 3 and not parameter.requires_grad):
            return self._whole(parameter)
        if self._stage == 3 and not parameter.requires_grad:
            return self._frozen_partition(parameter)
        if self._stage == 3:
            group, first, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            start = self.rank * padded
            count = max(0, min(padded, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping
            flat = self._zero.single_partition_of_fp32_groups[self._groups[id(parameter)]]
            first = start = count = 0
            if mapping is not None:
                first = mapping.hp_fragment_address.start
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        state = self.optimizer.state[flat]
        views: dict[str | None, Tensor] = {None: flat.data.narrow(0, first, count)}
        views |= {k: v.narrow(0, first, count) for k, v in state.items() if v.ndim}
        return _Part(views, start, {k: v for k, v in state.items() if not v.ndim})

    def _whole(self, parameter: Any) -> "_Part":
        """The whole parameter: without ZeRO, or frozen and therefore not partitioned (below ZeRO-3)."""
        state = self.optimizer.state.get(parameter, {})
        views: dict[str | None, Tensor] = {None: parameter.data.view(-1)}
        views |= {k: v.view(-1) for k, v in state.items() if v.ndim}
        scalars = {k: v for k, v in state.items() if not v.ndim}
        return _Part(views, 0, scalars, is_whole=True)

    def _frozen_partition(self, parameter: Any) -> "_Part":
        """This rank's ZeRO-3 partition of a frozen parameter, which the forward gathers."""
        flat = parameter.ds_tensor.data.view(-1)
        start = self.rank * flat.numel()
        count = max(0, min(flat.numel(), parameter.ds_numel - start))
        return _Part({None: flat.narrow(0, 0, count)}, start, {})

    @torch.no_grad()
    def loaded(self) -> None:
        """Copy the loaded fp32 partitions to the weights that the forward uses."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self.wrapped.empty_partition_cache()  # weights that an evaluation has left gathered
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """Allocate the optimizer state, at zero; ZeRO's optimizer steps on flat partitions."""
        if self._stage == 0:
            return super()._allocate_optimizer_state()
        names = {3: "fp32_partitioned_groups_flat"}
        flats = getattr(self._zero, names.get(self._stage, "single_partition_of_fp32_groups"))
        kept = [flat.grad for flat in flats]
        with self._without_update():
            for flat in flats:
                flat.grad = torch.zeros_like(flat)
            if self._stage == 3:  # ZeRO-3 steps each group separately
                for number in range(len(flats)):
                    self._zero._optimizer_step(number)
            else:
                self.optimizer.step()
        for flat, gradient in zip(flats, kept, strict=True):
            flat.grad = gradient
