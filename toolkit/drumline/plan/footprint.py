"""Memory of a plan: from a recipe and a split to the closed form's question, and its answer."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from drumline.architectures.gpus import Gpu
from drumline.architectures.shapes import ModelShape
from drumline.memory import closed_form
from drumline.memory.closed_form import Peak
from drumline.memory.load import Load
from drumline.plan.batch import Split
from drumline.plan.mesh import mesh_of
from drumline.plan.model import MemoryFacts
from drumline.plan.optimizers import rule_of, saved_bytes
from drumline.recipe.precision import PRECISIONS
from drumline.recipe.schema import Recipe

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration


def memory_function(
    recipe: Recipe,
    shape: ModelShape | str,
    gpu: Gpu,
    host_bytes: int | None,
    calibration: "Calibration | None" = None,
) -> Callable[[Split], MemoryFacts]:
    """Split -> MemoryFacts, with everything else of the recipe held fixed.

    `shape` is in words why it is not known, where it is not.
    """

    def memory(split: Split) -> MemoryFacts:
        capacity = capacity_of(gpu, split, host_bytes)
        if isinstance(shape, str):
            return unknown(capacity, shape)
        if recipe.data.sequence_length is None and not shape.patches:
            return unknown(capacity, "data.sequence_length is not set")
        if rule_of(recipe).state_count(recipe.optimizer) is None:
            return unknown(capacity, "optimizer.states is not set for the custom optimizer")
        peak = closed_form.estimate(load_of(recipe, shape, split, gpu), gpu)
        if calibration:
            corrected = calibration.correct(peak.totals, gpu.name, recipe.strategy.name)
            peak = replace(peak, totals=corrected)
        host = host_bytes_of(recipe, shape, split)
        return facts(peak, capacity, "closed-form", host)

    return memory


def facts(
    peak: Peak, capacity: int | None, method: Literal["closed-form", "traced"], host: int | None
) -> MemoryFacts:
    """An estimate against a capacity."""
    totals = peak.totals
    return MemoryFacts(
        unit="bytes per rank",
        parts=peak.parts,
        phases=peak.phases,
        allocated=totals.allocated,
        reserved=totals.reserved,
        device=totals.device,
        capacity=capacity,
        fits=None if capacity is None else totals.device.high <= capacity,
        method=method,
        peak_phase=peak.phase,
        why="; ".join(totals.basis.values()),
        basis=totals.basis,
        host_bytes=host,
    )


def host_bytes_of(recipe: Recipe, shape: ModelShape, split: Split) -> int | None:
    """What a rank keeps in the host's memory: its part of a checkpoint, and offloaded state.

    Every tensor of weights and optimizer is written by one rank, so a part is 1 / gpus of them all
    (`train/saver.py`); offload keeps the fp32 weights, their gradients and both moments.
    """
    whole = saved_bytes(recipe, shape)
    if whole is None:
        return None
    copy = whole // split.gpus if recipe.checkpoint.asynchronous else 0
    gradients = shape.parameters * PRECISIONS[recipe.precision].stored
    offloaded = (whole + gradients) // split.gpus
    return copy + (offloaded if recipe.strategy.offload == "optimizer" else 0)


def unknown(capacity: int | None, why: str) -> MemoryFacts:
    """What is said of memory when nothing is known."""
    return MemoryFacts(
        unit="bytes per rank",
        parts={},
        phases={},
        allocated=None,
        reserved=None,
        device=None,
        capacity=capacity,
        fits=None,
        method="unknown",
        peak_phase=None,
        why=why,
        basis={},
        host_bytes=None,
    )


def capacity_of(gpu: Gpu, split: Split, host_bytes: int | None) -> int | None:
    """The device's memory; on CPU the machine's, shared by its processes."""
    if not gpu.is_cpu:
        return gpu.memory_bytes
    return None if host_bytes is None else host_bytes // split.gpus


def load_of(recipe: Recipe, shape: ModelShape, split: Split, gpu: Gpu) -> Load:
    """What one rank of this split is asked to hold."""
    mesh = mesh_of(recipe, split.gpus)
    length = shape.tokens(recipe.data.sequence_length)
    evaluation, rule = recipe.evaluation, rule_of(recipe)
    states = rule.state_count(recipe.optimizer)
    assert states is not None
    is_foreach = recipe.optimizer.implementation == "foreach"
    return Load(
        shape=shape,
        per_device=split.per_device,
        sequence_length=length,
        ranks=mesh.ranks,
        nodes=mesh.nodes,
        shard_ranks=mesh.shards,
        strategy=recipe.strategy.name,
        precision=recipe.precision,
        optimizer_states=states,
        has_scratch=is_foreach and rule.scratch(False),
        has_scratch_in_a_step=is_foreach and rule.scratch(recipe.optimizer.weight_decay > 0),
        checkpointing=recipe.model.activation_checkpointing == "full",
        attention=recipe.model.attention,
        chunked_loss=recipe.loss.chunked,
        accumulation=split.accumulation,
        evaluation=(evaluation.per_device or split.per_device) if evaluation else None,
        is_masked=_is_masked(recipe, shape, length),
        has_flash=gpu.has_flash,
        offload=recipe.strategy.offload == "optimizer",
    )


def _is_masked(recipe: Recipe, shape: ModelShape, length: int) -> bool:
    """Padded rows of a classifier of texts, or a window that is shorter than the rows."""
    padded = recipe.data.facts.is_masked and not shape.patches
    return padded or (shape.window is not None and length > shape.window)
