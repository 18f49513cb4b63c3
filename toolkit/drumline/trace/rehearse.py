"""Runs the real engine and training step as rank 0 of any world size, without a GPU.

Tensors are fake (shapes and dtypes, no data), the process group is torch's fake one, and CUDA kernels have
stand-ins; everything else is the code of a run. The result is a recording of every allocation.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from drumline.architectures.fields import sides
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.tasks import Arrays, find_task
from drumline.data.validation_split import TRAIN
from drumline.errors import PlanError
from drumline.memory.recording import Recording
from drumline.phases import MemoryPhase, Phase
from drumline.plan.advise import with_torchrun
from drumline.plan.model import Plan
from drumline.plan.resolve import DEFAULT_CLASSES
from drumline.recipe.schema import Recipe
from drumline.trace.kernels import cuda_kernels
from drumline.trace.known_values import KnownValues
from drumline.trace.recorder import Recorder
from drumline.train.batches import MicroBatch, Step, as_tensors, open_rows
from drumline.train.engines.torch import TorchEngine
from drumline.train.loop import forward_backward
from drumline.train.models import ModelBuilder, build, builder
from drumline.train.models.build import reads_images
from drumline.train.models.quantized import QuantizedLinear
from drumline.train.watch import Watch


def rehearse(
    plan: Plan, manifest: DatasetManifest | None = None, fake: bool = True, micro_batches: int = 1
) -> Recording:
    """Record everything that rank 0 of the plan would allocate on its device, from building to saving.

    `fake=False` computes on real CPU tensors, to check that both allocate the same. `micro_batches`: how many
    micro-batches of the step to run; 1 runs only the last, which needs as much memory as any, or two where
    FSDP2 holds something from one to the next.
    """
    assert not dist.is_initialized(), "a rehearsal makes a process group of its own"
    _refuse_what_cannot_be_rehearsed(plan)
    recorder = Recorder()
    known = KnownValues() if fake and plan.recipe.data.is_chat_with_images else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_other_ranks(plan.mesh.ranks))
        stack.enter_context(_quiet_propagation(recorder))
        stack.enter_context(_streams(recorder))
        stack.enter_context(cuda_kernels())
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if known:
            stack.enter_context(known)
        stack.enter_context(recorder)
        try:
            _play(plan, manifest or blank_manifest(plan), recorder, micro_batches, known)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PlanError(
                f"--trace: this model's forward looks at values, which a trace has not: {error}"
            ) from None
    return recorder.recording


def _play(
    plan: Plan,
    manifest: DatasetManifest,
    recorder: Recorder,
    micro_batches: int,
    known: KnownValues | None,
) -> None:
    """Build, warm up, run one step, evaluate and save, as `train` does."""
    recipe = plan.recipe
    recorder.phase(MemoryPhase.LOAD)
    engine = RehearsedEngine(plan, manifest, recorder)
    _label(engine, recorder)
    config = getattr(engine.module.model, "config", None)
    recorder.recording.vocabulary = getattr(config, "vocab_size", None)
    tensors = rehearsal_batch(plan, manifest, plan.batch.per_device, known)
    has_gradients = micro_batches == 1 and plan.batch.accumulation > 1
    if engine.holds_between_micro_batches:
        micro_batches = max(2, micro_batches)
        has_gradients = plan.batch.accumulation > 2 and recipe.strategy.reduce != "step"
    step, phases = step_of(plan, tensors, micro_batches), _Phases(recorder)
    if engine.wrapped is not engine.module:
        # DDP's gradients exist after the warm-up.
        forward_backward(engine, step_of(plan, tensors, 1), phases)
        engine.check_that_all_is_used()
        engine.skip()
    elif has_gradients:
        # From the second micro-batch on, gradients exist.
        recorder.phase(MemoryPhase.BACKWARD)
        for parameter in engine._parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    losses = forward_backward(engine, step, phases)
    total = torch.stack(losses).sum() / step.weight
    _label(engine, recorder)
    recorder.phase(MemoryPhase.OPTIMIZER_STEP)
    norm = engine.clip(recipe.optimizer.max_grad_norm)
    engine.step(recipe.optimizer.lr)
    del losses, total, norm, step, tensors
    if recipe.row_evaluation:
        recorder.phase(MemoryPhase.EVALUATION)
        tensors = rehearsal_batch(plan, manifest, recipe.row_evaluation.per_device or 1, known)
        engine.evaluate(tensors)
    recorder.phase(MemoryPhase.SAVE)
    engine.shards()


class _Phases(Watch):
    """Maps the loop's phases to memory phases."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def enter(self, phase: Phase, detail: str = "", limit_s: float = 0.0) -> None:
        """Start the memory phase: forward with loss, or backward; `forward_backward` enters no other."""
        is_forward = phase is Phase.FORWARD
        self._recorder.phase(MemoryPhase.FORWARD if is_forward else MemoryPhase.BACKWARD)


class RehearsedEngine(TorchEngine):
    """The torch engine, recorded once its model is on the device.

    DDP's checks and exchanges of values between ranks are replaced by stand-ins.
    """

    def __init__(self, plan: Plan, manifest: DatasetManifest, recorder: Recorder) -> None:
        self._recorder = recorder
        with (
            recorder.paused(),
            patch.object(ModelBuilder, "_draw", _nothing),
            patch.object(ModelBuilder, "_hand_out", _materialise),
            patch.object(build, "PretrainedWeights", _NoWeights),
            patch.object(builder, "build_model", _built),
            patch.object(_fsdp_param, "_chunk_with_empty", _Chunks),
            patch.object(nn.Module, "to", lambda module, *given, **named: module),
        ):
            super().__init__(plan, manifest, torch.device("cpu"))

    def _wrap(self) -> Any:
        self._recorder.adopt(self.module.parameters(), "parameters")
        self._recorder.adopt(self.module.buffers(), "buffers")
        with self._recorder.paused(False):
            return super()._wrap()

    def _make_mesh(self) -> DeviceMesh:
        with self._recorder.paused(), _disable_current_modes():  # a mesh needs real values
            return super()._make_mesh()

    def _allocate_optimizer_state(self) -> None:
        with self._recorder.paused(False):
            super()._allocate_optimizer_state()

    def _begin_ema(self) -> None:
        with self._recorder.paused(False):
            super()._begin_ema()

    def _replicated_module(self) -> Any:
        with (
            patch.object(ddp, "_verify_param_shape_across_processes", _nothing),
            patch.object(ddp, "_sync_module_states", _nothing),
        ):
            wrapped = super()._replicated_module()
        wrapped.register_comm_hook(None, _answer_at_once)
        wrapped.reducer = _Reducer(wrapped.reducer)
        return wrapped


class _Chunks:
    """A tensor's chunks, made on access: FSDP2 uses one or two of them, of as many as there are ranks."""

    def __init__(self, tensor: Tensor, count: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._size = -(-tensor.shape[dim] // count)

    def __getitem__(self, number: int) -> Tensor:
        whole = self._tensor.shape[self._dim]
        start = min(whole, number * self._size)
        return self._tensor.narrow(self._dim, start, min(self._size, whole - start))


class _Reducer:
    """DDP's reducer without rebuilding its buckets, which would broadcast values between ranks."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _answer_at_once(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _materialise(maker: ModelBuilder, modules: list[nn.Module], source: int) -> None:
    """Replace meta tensors by zeros, which saves the time of random initialisation."""
    for module in modules:
        if isinstance(module, QuantizedLinear):
            module.pack()
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                is_trained = parameter.requires_grad
                wanted = maker._dtype if is_trained else maker._frozen_dtype
                dtype = wanted if wanted and parameter.is_floating_point() else parameter.dtype
                zeros = torch.zeros_like(parameter, device="cpu", dtype=dtype)
                module._parameters[parameter_name] = nn.Parameter(zeros, is_trained)
        for buffer_name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[buffer_name] = torch.zeros_like(buffer, device="cpu")


def _built(recipe: Recipe, manifest: DatasetManifest) -> build.Built:
    """The model on the meta device, with real values where its code computes them while it is built."""
    if recipe.model.source == "factory":  # its weights are real, so they have to be fake
        return build.build_model(recipe, manifest)
    with _disable_current_modes():
        return build.build_model(recipe, manifest)


class _NoWeights:
    """In place of pretrained weights, whose values a trace does not need."""

    missing: tuple[str, ...] = ()

    def __init__(self, form: Any, folder: Any, has_new_head: bool) -> None: ...

    def tie(self, model: Any) -> None:
        """Tie as the config says."""
        model.tie_weights()


def _nothing(*arguments: Any, **options: Any) -> None:
    return None


def _label(engine: TorchEngine, recorder: Recorder) -> None:
    parameters = list(engine._parameters.values())
    recorder.label(parameters, "parameters")
    recorder.label((p.grad for p in parameters), "gradients")
    states = engine.optimizer.state.values()
    recorder.label((v for s in states for v in s.values() if isinstance(v, Tensor)), "optimizer")
    recorder.label(engine.ema.averages.values() if engine.ema else (), "optimizer")


def step_of(plan: Plan, tensors: dict[str, Tensor], count: int) -> Step:
    """A step of `count` equal micro-batches."""
    nothing = np.zeros(0, dtype=np.int64)
    one = MicroBatch(tensors=tensors, first_slot=0, is_dummy=False, indices=nothing)
    return Step(
        number=1,
        epoch=1,
        samples=plan.batch.effective,
        tokens=1,
        weight=1.0,
        digest="",
        indices=nothing,
        seeds=nothing.astype(np.uint64),
        micro_batches=[one] * count,
    )


def rehearsal_batch(
    plan: Plan, manifest: DatasetManifest, rows: int, known: KnownValues | None = None
) -> dict[str, Tensor]:
    """Tensors as from `StepReader`, of the largest shape: all zero, or copies of the largest prepared row."""
    task = find_task(plan.recipe.data, plan.recipe.project)
    with _disable_current_modes():  # samples of the project are made of real values
        blank = (
            _largest(plan, manifest, rows)
            if task.is_traced_by_a_row
            else task.blank(rows, manifest)
        )
        count = len(blank["targets"]) if task.is_traced_by_a_row else rows  # maybe one more
        real = as_tensors(blank, np.zeros(count), dummy=False)
    tensors = known.tell(real) if known else as_tensors(blank, np.zeros(count), dummy=False)
    if plan.recipe.model.neftune_alpha is not None:
        tensors["lengths"] = torch.ones(rows, dtype=torch.int64)
    return tensors


def _largest(plan: Plan, manifest: DatasetManifest, rows: int) -> Arrays:
    """The largest prepared rows, where the shape of a sample is known of these only; evaluated ones, too."""
    if plan.data.cache is None:
        raise PlanError(
            "--trace: how many images a chat has, and of which sizes, is not known until the data are "
            "prepared. Nearest: `drumline prepare`"
        )
    read = [TRAIN, *(manifest.evaluation_parts.values() if plan.recipe.row_evaluation else ())]
    parts = [open_rows(plan, part) for part in read]
    made = [
        rows_of.collate(rows_of.task.largest(rows_of, rows)) for rows_of in parts if len(rows_of)
    ]
    largest = max(made, key=lambda arrays: sum(values.size for values in arrays.values()))
    return parts[0].task.widen(largest, manifest)


def blank_manifest(plan: Plan) -> DatasetManifest:
    """A dataset manifest with the shapes that a trace needs, for data not prepared yet."""
    data, model = plan.recipe.data, plan.recipe.model
    features = None
    if model.architecture and reads_images(model.architecture):
        config = {**model.config, **(model.config.get("vision_config") or {})}
        features = [config.get("num_channels", 3), *sides(config, "image_size", 224)]
    if data.image and data.image.size and not data.is_chat_with_images:
        size = data.image.size
        features = [data.image.channels, *([size, size] if isinstance(size, int) else size)]
    return DatasetManifest(
        task=data.task,
        fingerprint="",
        samples=1,
        validation_samples=1,
        sequence_length=data.sequence_length,
        feature_shape=features,
        classes=DEFAULT_CLASSES,
        sequences=plan.recipe.objective.facts.sequences,
    )


def _refuse_what_cannot_be_rehearsed(plan: Plan) -> None:
    recipe = plan.recipe
    if recipe.strategy.name.startswith("zero") or recipe.launch.launcher == "deepspeed":
        raise PlanError(
            "--trace: DeepSpeed cannot be traced without a GPU. Nearest: the closed form (no --trace), "
            f"or {with_torchrun(recipe)}"
        )
    if recipe.model.sync_batchnorm:
        raise PlanError("--trace: torch's SyncBatchNorm needs a GPU. Nearest: sync_batchnorm false")


@contextlib.contextmanager
def _other_ranks(world: int) -> Iterator[None]:
    hook = sys.excepthook  # torch replaces it, again for every process group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@contextlib.contextmanager
def _quiet_propagation(recorder: Recorder) -> Iterator[None]:
    """Context that does not record the whole tensors on which DTensor runs operators to infer shapes."""
    real = ShardingPropagator._propagate_tensor_meta_non_cached

    def quiet(self: Any, *arguments: Any) -> Any:
        with recorder.paused():
            return real(self, *arguments)

    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", quiet):
        yield


@contextlib.contextmanager
def _streams(recorder: Recorder) -> Iterator[None]:
    """Context that records FSDP2's allocations on side streams as those of separate streams."""
    with patch.object(torch.cpu, "stream", lambda stream: recorder.on_stream(id(stream))):
        yield
