"""DeepSpeed: ZeRO stages 0 to 3 under drumline's loss weighting, clipping, schedule and checkpoints.

DeepSpeed averages over ranks and, if left to itself, over micro-batches; here backward runs on
Σ·G/W, unscaled, and the last micro-batch of a step is marked by hand. State is read and written in
place, in the fp32 partitions that the optimizer itself updates.
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

from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import LaunchError
from drumline.plan.deepspeed import STAGES, deepspeed_config
from drumline.plan.model import Plan
from drumline.train.engines.base import Engine, TensorShard
from drumline.train.models import ModelBuilder, has_batchnorm
from drumline.train.models.builder import Progress, ignore_progress
from drumline.train.objectives import ObjectiveModule, build_objective
from drumline.train.optimizers import build_optimizer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # two minutes of compiling on a CPU
logger.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())  # metrics.jsonl tells skips


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a rank holds of a parameter: flat views by key of the optimizer's state, None for the weight.

    `start`: the first element; `scalars`: state that the parameters of a group share.
    """

    views: dict[str | None, Tensor]
    start: int
    scalars: dict[str, Tensor]
    is_whole: bool = False


class DeepSpeedEngine(Engine):
    """A DeepSpeedEngine around the loss module."""

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
        self._config = deepspeed_config(plan)
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
        builder = ModelBuilder(recipe, manifest, device, progress=progress)
        for block in builder.blocks():
            self._partition(block)
        model = builder.finish()
        self._partition(model)
        self.module = ObjectiveModule(model, build_objective(recipe))
        self.has_batchnorm = has_batchnorm(model)
        if recipe.model.compile:
            self.module.compile()
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
        for owner in filter(None, (engine, self._zero)):  # drumline's own scaler looks at all ranks
            owner.torch_autocast_z0_gradscaler = owner.torch_autocast_gradscaler = None
        self.optimizer = self._zero.optimizer if self._zero else engine.optimizer
        groups = self._zero.bit16_groups if self._zero and self._stage < 3 else []
        self._groups = {id(p): number for number, group in enumerate(groups) for p in group}
        self._norm: Any = None
        self._scale = 1.0
        self._check(engine)
        self._allocate_optimizer_state()

    def _check(self, engine: Any) -> None:
        found = (engine.dp_world_size, engine.global_rank, engine.zero_optimization_stage())
        planned = (self.mesh.data_ranks, self.rank, self._stage)
        if found != planned:
            raise LaunchError(
                f"DeepSpeed sees (ranks, rank, ZeRO stage) {found}, the plan names {planned}"
            )

    def _partition(self, block: nn.Module) -> None:
        """ZeRO-3: keep this rank's part of a block that has just been made."""
        if self._stage == 3:
            deepspeed.zero.Init(module=block, config_dict_or_path=self._config, dtype=torch.float32)

    def clip(self, max_norm: float | None) -> Tensor:
        """Measure the norm of the whole, unscaled gradient; ZeRO clips to it as it steps."""
        if self._zero is None:
            return self._clip_gradients(max_norm)
        if self._stage == 3:
            self._norm = combine_grad_norm_groups(type(self._zero)._get_norm_groups(self._zero))
        else:
            self._norm = type(self._zero).scaled_global_norm(self._zero)
        self._scale = self.scaler.scale if self.scaler else 1.0
        scaled = torch.as_tensor(self._norm, dtype=torch.float32, device=self.device).reshape(())
        return torch.where(scaled < 0, torch.inf, scaled / self._scale)  # its -1: not finite

    def step(self, rate: float) -> None:
        """One optimizer update at this learning rate; forgets the gradients."""
        self._set_rate(rate)
        if self._zero is not None:
            self._step_with_norm(self._norm)
        else:
            self.wrapped.step()

    def skip(self) -> None:
        """Forget the gradients without an update: what ZeRO does itself when a norm is not finite."""
        if self._zero is not None:
            self._step_with_norm(torch.tensor(-1.0, device=self.device))
        else:
            self.wrapped.zero_grad()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Put together from ZeRO's partitions, where it clips only later."""
        for name, parameter in self._trainable():
            gradient = parameter.grad if self._stage == 0 else safe_get_full_grad(parameter)
            if gradient is not None:
                scale = self._scale if self._stage else 1.0
                yield name, gradient.view(getattr(parameter, "ds_shape", parameter.shape)) / scale

    def _step_with_norm(self, norm: Any) -> None:
        """DeepSpeed's step, with the norm given: once measured, or made up to be refused.

        It divides by the loss scale that the gradients have, which its own backward must not apply.
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

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # torch_autocast in the configuration

    def state_shards(self) -> Iterator[tuple[str, TensorShard]]:
        """Views of the fp32 partitions, where the optimizer keeps weights and state."""
        for number, (name, parameter) in enumerate(self._parameters.items()):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            part = self._part_of(parameter)
            for key, view in part.views.items():
                stored = f"model.{name}" if key is None else f"optimizer.{name}.{key}"
                if part.is_whole:
                    whole = self._replicated(view, number)
                    yield stored, dataclasses.replace(whole, shape=shape)
                else:
                    yield stored, TensorShard(view, shape, part.start, owned=view.numel() > 0)
            for key, value in part.scalars.items():
                yield f"optimizer.{name}.{key}", self._replicated(value, number)

    def _trainable(self) -> Iterator[tuple[str, Any]]:
        return ((name, p) for name, p in self._parameters.items() if p.requires_grad)

    def _part_of(self, parameter: Any) -> "_Part":
        """What this rank holds of a parameter and of its optimizer state."""
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
        """Every rank holds it all: without ZeRO, or frozen and therefore not partitioned."""
        state = self.optimizer.state.get(parameter, {})
        views: dict[str | None, Tensor] = {None: parameter.data.view(-1)}
        views |= {k: v.view(-1) for k, v in state.items() if v.ndim}
        scalars = {k: v for k, v in state.items() if not v.ndim}
        return _Part(views, 0, scalars, is_whole=True)

    def _frozen_partition(self, parameter: Any) -> "_Part":
        """ZeRO-3's own partition, which is what the forward gathers."""
        flat = parameter.ds_tensor.data.view(-1)
        start = self.rank * flat.numel()
        count = max(0, min(flat.numel(), parameter.ds_numel - start))
        return _Part({None: flat.narrow(0, 0, count)}, start, {})

    @torch.no_grad()
    def loaded(self) -> None:
        """The fp32 partitions were filled: bring the weights of the forward in line."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """The same for ZeRO, whose optimizer steps on flat partitions."""
        if self._stage == 0:
            return super()._allocate_optimizer_state()
        names = {3: "fp32_partitioned_groups_flat"}
        flats = getattr(self._zero, names.get(self._stage, "single_partition_of_fp32_groups"))
        kept = [flat.grad for flat in flats]
        with self._without_update():
            for flat in flats:
                flat.grad = torch.zeros_like(flat)
            if self._stage == 3:  # a step of its own for each group
                for number in range(len(flats)):
                    self._zero._optimizer_step(number)
            else:
                self.optimizer.step()
        for flat, gradient in zip(flats, kept, strict=True):
            flat.grad = gradient
