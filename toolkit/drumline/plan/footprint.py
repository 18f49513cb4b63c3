"""Memory of a plan: builds the closed form's input from a recipe and a split, and its MemoryFacts."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from drumline.architectures.gpus import Gpu
from drumline.architectures.shapes import ModelShape, count, layer_tensors, outer_tensors
from drumline.architectures.trained import trained_parameters
from drumline.memory import closed_form
from drumline.memory.closed_form import Peak
from drumline.memory.load import EMA_BYTES, Load, StateSize, zero_sizes
from drumline.memory.ranges import Device
from drumline.plan.batch import Split
from drumline.plan.mesh import Mesh, mesh_of
from drumline.plan.model import FITS, MemoryFacts
from drumline.plan.optimizers import frozen_bytes, rule_of, saved_bytes
from drumline.recipe.precision import find_precision
from drumline.recipe.schema import Recipe
from drumline.units import format_bytes

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration


def memory_function(
    recipe: Recipe,
    shape: ModelShape | str,
    gpu: Gpu,
    host_bytes: int | None,
    calibration: "Calibration | None" = None,
    row_tokens: int | None = None,
) -> Callable[[Split], MemoryFacts]:
    """A function from a split to its MemoryFacts, for this recipe.

    `shape` is a text that gives the reason if the model's shape is not known. `row_tokens`: of the longest
    row that the run reads, if that is known.
    """
    length = recipe.data.sequence_length
    is_shorter = row_tokens is not None and (length is None or row_tokens < length)
    if is_shorter:
        length = row_tokens

    def memory(split: Split) -> MemoryFacts:
        capacity = capacity_of(gpu, split, host_bytes)
        if isinstance(shape, str):
            return unknown(capacity, shape)
        if code := unseen_code(recipe):
            return unknown(capacity, f"no closed form for {code}")
        if length is None and not shape.patches:
            return unknown(capacity, "data.sequence_length is not set, and no data are prepared")
        if rule_of(recipe).states(recipe.optimizer, 4) is None:
            return unknown(capacity, "optimizer.states is not set for the custom optimizer")
        device = device_of(gpu, capacity, mesh_of(recipe, split.gpus))
        row = calibration.row(gpu.name, recipe.strategy.name) if calibration else None
        if row:
            device = row.applied_to(device)
        load = load_of(recipe, shape, split, gpu, length)
        peak = closed_form.estimate(load, device)
        if row:
            peak = replace(peak, totals=row.correct(peak.totals))
        if is_shorter:
            basis = peak.totals.basis | {
                "rows": f"the longest row of this run has {row_tokens} tokens"
            }
            peak = replace(peak, totals=replace(peak.totals, basis=basis))
        host = host_bytes_of(recipe, shape, split, length)
        return facts(peak, capacity, "closed-form", host)

    return memory


def unseen_code(recipe: Recipe) -> str:
    """The first of the project's functions that changes what a step computes; empty where there is none."""
    named = (*recipe.model.edits, recipe.objective.factory, recipe.data.task_factory)
    return next((name for name in named if name), "")


def facts(
    peak: Peak, capacity: int | None, method: Literal["closed-form", "traced"], host: int | None
) -> MemoryFacts:
    """MemoryFacts of an estimate; `capacity` in bytes, None if not known."""
    totals, verdict = peak.totals, peak.totals.verdict(capacity)
    return MemoryFacts(
        unit="bytes per rank",
        parts=peak.parts,
        phases=peak.phases,
        allocated=totals.allocated,
        reserved=totals.reserved,
        device=totals.device,
        capacity=capacity,
        verdict=verdict,
        fits=FITS[verdict],
        method=method,
        peak_phase=peak.phase,
        why="; ".join(totals.basis.values()),
        basis=totals.basis,
        host_bytes=host,
    )


def host_bytes_of(
    recipe: Recipe, shape: ModelShape, split: Split, length: int | None
) -> int | None:
    """Bytes that one rank keeps in host memory: the copy for asynchronous checkpoints, offloaded tensors.

    Before that, a pretrained model's weights pass through it: a block that the rank reads, in fp32, and one
    that it receives. Each tensor of the weights and the optimizer state is written by one rank, so a rank's
    part is 1 / gpus of the total; frozen weights are not copied (`train/saver.py`). Offload keeps the fp32
    weights, their gradients and the optimizer state, also 1 / gpus per rank. None if the optimizer's states
    are not known.
    """
    whole = saved_bytes(recipe, shape)
    if whole is None:
        return None
    copied = whole - frozen_bytes(recipe, shape)
    copy = copied // split.gpus if recipe.checkpoint.asynchronous else 0
    width = find_precision(recipe.precision, recipe.strategy.name).stored
    gradients = trained_parameters(shape) * width
    offloaded = (whole + gradients) // split.gpus
    inputs = 0
    if recipe.model.activation_offload:
        rows = split.per_device * recipe.objective.facts.sequences * shape.tokens(length)
        inputs = shape.layers * rows * shape.hidden * 4  # at most fp32
    loading = 0
    if recipe.model.source in ("folder", "hub"):
        blocks = [count(layer_tensors(one)) for one, _ in shape.layer_shapes]
        loading = 2 * 4 * max(*blocks, count(outer_tensors(shape)))
    kept = copy + inputs + (offloaded if recipe.strategy.offload == "optimizer" else 0)
    return max(kept, loading)


def memory_warnings(memory: MemoryFacts, gpu: str) -> list[str]:
    """What the plan says of a memory that is not known, or that is tight."""
    if memory.method == "unknown":
        return [
            f"memory is not known: {memory.why}. Nearest: `drumline plan --trace`, which is kept "
            "for later plans of the same step"
        ]
    if memory.verdict != "tight":
        return []
    assert memory.device and memory.capacity
    low, high, capacity = (
        format_bytes(size) for size in (memory.device.expected, memory.device.high, memory.capacity)
    )
    over = format_bytes(memory.device.high - memory.capacity)
    return [
        f"memory is tight: {low} expected and at most {high}, {over} above the {capacity} of {gpu}"
    ]


def unknown(capacity: int | None, why: str) -> MemoryFacts:
    """MemoryFacts of a plan whose memory cannot be estimated, with the reason `why`."""
    return MemoryFacts(
        unit="bytes per rank",
        parts={},
        phases={},
        allocated=None,
        reserved=None,
        device=None,
        capacity=capacity,
        verdict="unknown",
        fits=None,
        method="unknown",
        peak_phase=None,
        why=why,
        basis={},
        host_bytes=None,
    )


def device_of(gpu: Gpu, capacity: int | None, mesh: Mesh) -> Device:
    """The device of one rank, with `capacity` in bytes."""
    return Device(
        capacity, gpu.workspace_bytes, mesh.ranks, mesh.nodes, gpu.is_cpu, gpu.context_bytes
    )


def capacity_of(gpu: Gpu, split: Split, host_bytes: int | None) -> int | None:
    """Memory of the device in bytes; on CPU the host's memory divided by the number of processes."""
    if not gpu.is_cpu:
        return gpu.memory_bytes
    return None if host_bytes is None else host_bytes // split.gpus


def load_of(recipe: Recipe, shape: ModelShape, split: Split, gpu: Gpu, length: int | None) -> Load:
    """The closed form's input for one rank of this split; `length`: tokens of a row, None for images."""
    mesh = mesh_of(recipe, split.gpus)
    evaluation, rule = recipe.row_evaluation, rule_of(recipe)
    width = find_precision(recipe.precision, recipe.strategy.name).stored
    states = rule.states(recipe.optimizer, width)
    assert states is not None
    is_foreach = recipe.optimizer.implementation == "foreach"
    return Load(
        shape=shape,
        per_device=split.per_device * recipe.objective.facts.sequences,
        sequence_length=shape.tokens(length),
        ranks=mesh.ranks,
        nodes=mesh.nodes,
        shard_ranks=mesh.shards,
        strategy=recipe.strategy.name,
        precision=recipe.precision,
        optimizer_states=states + ((StateSize.uniform(EMA_BYTES),) if recipe.ema else ()),
        has_scratch=is_foreach and rule.scratch(False),
        has_scratch_in_a_step=is_foreach and rule.scratch(recipe.optimizer.weight_decay > 0),
        checkpointing=recipe.model.activation_checkpointing,
        offloads_inputs=recipe.model.activation_offload,
        attention=recipe.model.attention,
        chunked_loss=recipe.loss.chunked,
        has_z_loss=recipe.loss.z_loss > 0,
        accumulation=split.accumulation,
        evaluation=(evaluation.per_device or split.per_device) * recipe.objective.facts.sequences
        if evaluation
        else None,
        is_masked=(recipe.data.facts.is_masked and not shape.patches)
        or recipe.data.packs_documents,
        has_flash=gpu.has_flash,
        offload=recipe.strategy.offload == "optimizer",
        zero=zero_sizes(trained_parameters(shape)),
        folds=rule.is_elementwise,
        scratch_of_largest=rule.scratch_of_largest,
        scratch_at_most=rule.scratch_at_most,
        gathers_to_step=rule.gathers,
        longest=recipe.data.sequence_length,
        reshard=recipe.strategy.reshard,
        reduces_once=recipe.strategy.reduce == "step",
    )
