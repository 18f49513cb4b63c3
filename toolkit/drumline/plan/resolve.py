"""`resolve(recipe, world) -> Plan`: a pure function from a recipe to its resolved Plan."""

from dataclasses import replace
from functools import partial
from typing import Any

from drumline.architectures.config_fields import check_config
from drumline.architectures.configs import read_shape
from drumline.architectures.gpus import find_gpu, gpu_warnings, with_own_name
from drumline.architectures.labels import number_of_labels
from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import with_trained
from drumline.memory.ranges import Verdict
from drumline.plan import batch as batch_equation
from drumline.plan import identity, schedule
from drumline.plan.batch import Split
from drumline.plan.checks import (
    check_image,
    check_model,
    check_packing,
    check_padding,
    check_pairs,
    check_positions,
    check_shape,
    check_strategy,
    check_weights,
)
from drumline.plan.footprint import memory_function, memory_warnings, unseen_code
from drumline.plan.invariance import batchnorm_warnings, split_invariance
from drumline.plan.job_time import with_time
from drumline.plan.mesh import cluster_gpus, is_laid_out, layout
from drumline.plan.model import (
    FITS,
    PLAN_VERSION,
    BatchFacts,
    DataFacts,
    MemoryFacts,
    Plan,
    RampFacts,
    SourceFacts,
    StartFacts,
)
from drumline.plan.optimizers import resolved_optimizer
from drumline.plan.step_counts import curve_of, step_facts
from drumline.plan.warnings import plan_warnings
from drumline.plan.work import cost_of_step
from drumline.plan.world import NOTHING_KNOWN, World
from drumline.recipe.schema import Recipe

DEFAULT_CLASSES = 2
"""Assumed classes of a classifier whose data are not prepared; they hardly affect its memory."""

_HIGHER_IS_BETTER = ("accuracy", "f1", "reward_margin", "_chosen")
"""Ends of the names of metrics that should grow."""

_SURELY_FITS: dict[Verdict, bool | None] = {**FITS, "tight": False}
"""What the search for per_device takes as fitting."""


def resolve(recipe: Recipe, world: World = NOTHING_KNOWN, *, is_candidate: bool = False) -> Plan:
    """The Plan of a recipe; raises PlanError with the nearest legal fix.

    `is_candidate`: the plan is only compared with others, so its hashes are left empty to save time.
    """
    gpu = find_gpu(recipe.cluster.gpu)
    stated, recipe = recipe.cluster.gpu_name, with_own_name(recipe, gpu)
    check_strategy(recipe)
    world, mixture = _with_mixture(recipe, world)
    found = shape_of(recipe, world)
    shape = None if isinstance(found, str) else found
    seen = with_trained(shape, recipe.model) if shape else found
    _check_rows(recipe, found, shape, world)
    start = _start(recipe, shape, world)
    memory_of = memory_function(
        recipe, seen, gpu, world.host_memory_bytes, world.calibration, world.row_tokens
    )
    split, warnings = batch_equation.solve(
        recipe.batch,
        cluster_gpus(recipe),
        lambda s: _SURELY_FITS[memory_of(s).verdict],
        partial(is_laid_out, recipe),
    )
    _check_inputs(recipe, world, split)
    resolved = _fill(recipe, split, start)
    batch = _batch_facts(recipe, split)
    steps, clock = step_facts(recipe, split, world, start)
    batch_equation.check_ramp(recipe.batch, steps.total)
    curve = curve_of(recipe, split, steps)
    schedule.check_warmup(curve, clock)
    memory = memory_of(split)
    recipe_sha256, training_sha256 = ("", "") if is_candidate else identity.hashes(resolved)
    counted = None if unseen_code(resolved) or isinstance(seen, str) else seen
    warnings += [
        *world.problems,
        *world.notes,
        *_warnings_of_memory(recipe, memory, gpu.name),
        *gpu_warnings(recipe, gpu, stated),
        *batchnorm_warnings(resolved, split, world.batchnorm == "yes"),
        *plan_warnings(recipe, split, curve, clock, start, world.parent),
    ]
    plan = Plan(
        plan_version=PLAN_VERSION,
        recipe=resolved,
        recipe_sha256=recipe_sha256,
        training_sha256=training_sha256,
        split_invariance=split_invariance(
            resolved, shape, _whole_config(resolved, world)[1], world.batchnorm
        ),
        batch=batch,
        steps=steps,
        memory=memory,
        schedule=curve,
        cost=cost_of_step(resolved, split, counted, _lengths(recipe, world), world.weights_bytes),
        data=_data_facts(world, mixture),
        advice=[],
        warnings=warnings,
        start=start,
        site=world.site,
    )
    return plan if is_candidate else with_time(plan, counted, world.calibration)


def _check_rows(
    recipe: Recipe, found: ModelShape | str, shape: ModelShape | None, world: World
) -> None:
    """Whether rows, their pairs and the weights at hand go with the model."""
    check_shape(recipe, found, world.row_tokens)
    check_pairs(recipe, world.sequences)
    if shape and world.weights is not None:
        check_weights(recipe, shape, world.weights)


def _check_inputs(recipe: Recipe, world: World, split: Split) -> None:
    """Whether the model takes padded rows, as many as the split has, and packed ones."""
    architecture, config = _whole_config(recipe, world)
    check_padding(recipe, architecture, config, split.per_device)
    if recipe.model.source in ("config", "factory") or world.model_config is not None:
        check_packing(recipe, architecture)


def _warnings_of_memory(recipe: Recipe, memory: MemoryFacts, gpu: str) -> list[str]:
    compiled = recipe.model.compile and memory.method != "unknown"
    told = "memory is estimated without torch.compile, which stores fewer activations"
    return [*([told] if compiled else []), *memory_warnings(memory, gpu)]


def _batch_facts(recipe: Recipe, split: Split) -> BatchFacts:
    ramp = batch_equation.split_ramp(recipe.batch, split)
    return BatchFacts(
        effective=split.effective,
        per_device=split.per_device,
        gpus=split.gpus,
        accumulation=split.accumulation,
        remainder=recipe.batch.remainder,
        nodes=layout(recipe, split).nodes,
        ramp=[
            RampFacts(until, own.effective, own.per_device, own.accumulation) for until, own in ramp
        ],
    )


def _data_facts(world: World, mixture: list[SourceFacts]) -> DataFacts:
    return DataFacts(
        fingerprint=world.fingerprint,
        rows=world.rows,
        cache=world.cache,
        validation_samples=world.validation_samples,
        row_tokens=world.row_tokens,
        row_lengths=world.row_lengths,
        mixture=mixture,
    )


def _with_mixture(recipe: Recipe, world: World) -> tuple[World, list[SourceFacts]]:
    """What is known of the data of a mixture, with its sources' shares of an epoch; else no sources."""
    samples = recipe.data.samples or world.samples
    if recipe.data.mixture is None or samples is None:
        return world, []
    from drumline.plan.mixture import mixed_fingerprint, mixed_lengths, source_facts

    sources = source_facts(recipe.data, world.mixture, samples)
    if world.fingerprint is None:
        return replace(world, samples=samples), sources
    shares, lengths = [own.share for own in sources], world.mixture_lengths
    changed = replace(
        world,
        samples=samples,
        fingerprint=mixed_fingerprint(world.fingerprint, shares),
        rows=mixed_fingerprint(world.rows, shares) if world.rows else None,
        row_lengths=mixed_lengths(lengths, shares) if lengths else None,
    )
    return changed, sources


def _start(recipe: Recipe, shape: ModelShape | None, world: World) -> StartFacts | None:
    """What is taken over from another run's checkpoint; None where the recipe names none."""
    if recipe.start_from is None or world.start is not None:
        return world.start
    from drumline.plan.start import check_weights_of, start_facts

    assert world.parent is not None
    if shape:
        check_weights_of(recipe, world.parent, shape)
    return start_facts(recipe, world.parent, world.fingerprint, world.rows)


def _fill(recipe: Recipe, split: Split, start: StartFacts | None) -> Recipe:
    """The recipe with derived values filled in, so that planning it again gives the same values.

    cluster.nodes is not filled in: it follows from the split, which a resume may change.
    """
    update: dict[str, Any] = {"batch": split.written_into(recipe.batch)}
    if recipe.row_evaluation and recipe.evaluation and recipe.evaluation.per_device is None:
        update["evaluation"] = recipe.evaluation.model_copy(update={"per_device": split.per_device})
    update["optimizer"] = resolved_optimizer(recipe)
    if recipe.early_stopping and recipe.early_stopping.mode is None:
        is_up = recipe.early_stopping.metric.endswith(_HIGHER_IS_BETTER)
        mode = {"mode": "max" if is_up else "min"}
        update["early_stopping"] = recipe.early_stopping.model_copy(update=mode)
    if recipe.start_from and start:
        found = {"run": start.run, "step": start.step, "training_sha256": start.training_sha256}
        update["start_from"] = recipe.start_from.model_copy(update=found)
    return recipe.model_copy(update=update)


def _lengths(recipe: Recipe, world: World) -> list[int]:
    """Tokens of the rows, as far as they are known: those that were prepared, or one for all rows."""
    length = recipe.data.sequence_length or world.row_tokens
    return world.row_lengths or ([length] if length else [])


def shape_of(recipe: Recipe, world: World) -> ModelShape | str:
    """The model's shape or, if its architecture is not known, a text that says why."""
    model = recipe.model
    if model.source == "factory":
        return f"no closed form for {model.factory}"
    if model.source != "config" and world.model_config is None:
        return f"the config of {model.name or model.path} is not at hand"
    architecture, config = _whole_config(recipe, world)
    if recipe.data.audio:
        return f"no closed form for {architecture}, which hears recordings"
    if recipe.data.is_chat_with_images:
        return f"no closed form for {architecture}, which reads images and text"
    check_config(architecture, model.config)
    check_model(recipe, architecture, config)
    check_image(recipe, config)
    classes = None
    if recipe.data.facts.has_labels:
        problem = recipe.data.facts.problem
        found = number_of_labels(model.config, world.model_config, world.classes, problem)
        classes = found or DEFAULT_CLASSES
    shape = read_shape(architecture, config, classes, recipe.data.facts.head)
    if isinstance(shape, str):
        check_positions(recipe, architecture, config, world.row_tokens)
    return shape


def _whole_config(recipe: Recipe, world: World) -> tuple[str, dict[str, Any]]:
    """The architecture, and the recipe's config on top of the pretrained model's; empty where not known."""
    saved = world.model_config or {}
    of_timm = "timm_wrapper" if "pretrained_cfg" in saved else ""
    architecture = recipe.model.architecture or str(saved.get("model_type", of_timm))
    return architecture, {**saved, **recipe.model.config}
