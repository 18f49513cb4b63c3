"""`resolve(recipe, world) -> Plan`: a pure function from a recipe to its resolved Plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from drumline.architectures.config_fields import check_config
from drumline.architectures.configs import read_shape
from drumline.architectures.gpus import find_gpu, gpu_warnings, with_own_name
from drumline.architectures.labels import number_of_labels
from drumline.architectures.shapes import ModelShape
from drumline.architectures.trained import with_trained
from drumline.errors import NotPrepared, PlanError
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
from drumline.plan.mesh import cluster_gpus, is_laid_out, layout, mesh_of
from drumline.plan.model import (
    FITS,
    NO_SITE,
    PLAN_VERSION,
    BatchFacts,
    DataFacts,
    Plan,
    RampFacts,
    SiteFacts,
    SourceFacts,
    StartFacts,
    StepFacts,
    clock_of,
)
from drumline.plan.noise import is_measurable
from drumline.plan.optimizers import resolved_optimizer
from drumline.plan.steps import Clock, Place
from drumline.plan.work import cost_of_step, tokens_per_step
from drumline.recipe.schema import Recipe

if TYPE_CHECKING:
    from drumline.memory.calibration import Calibration
    from drumline.plan.start import Parent

DEFAULT_CLASSES = 2
"""Assumed classes of a classifier whose data are not prepared; they hardly affect its memory."""

_NEAR_THE_PEAK = 0.9
"""A run whose highest rate is less than this part of the peak is warned of."""
_WITHOUT_A_MINIMUM = ("constant", "inverse_sqrt", "piecewise")
"""Schedules that decay to no minimum, so a warm-up of the whole run cuts nothing off."""

_HIGHER_IS_BETTER = ("accuracy", "f1", "reward_margin", "_chosen")
"""Ends of the names of metrics that should grow."""

_SURELY_FITS: dict[Verdict, bool | None] = {**FITS, "tight": False}
"""What the search for per_device takes as fitting."""


@dataclass(frozen=True)
class World:
    """Facts from outside the recipe (files, prepared data, host), read by the caller; `resolve` is pure.

    `batchnorm`: whether a factory's model has it. `weights`: shapes of the tensors of a pretrained model,
    by name. `row_tokens`: tokens of the longest row that the run reads, or else of all prepared ones.
    `row_lengths`: as in DataFacts. `mixture`: prepared rows of each source by its label; `mixture_lengths`:
    as `row_lengths`, of each. `sequences`: of tokens that a prepared row holds.
    `parent`: the checkpoint that `start_from` names; `start`: of a run that has begun, what its plan says of
    that, instead. `problems`: what was found wrong with the data; `notes`: of the model. Both are told.
    `site`: of the cluster that is planned for.
    """

    model_config: dict[str, Any] | None = None
    weights: Mapping[str, tuple[int, ...]] | None = None
    weights_bytes: int | None = None
    samples: int | None = None
    validation_samples: int | None = None
    row_tokens: int | None = None
    row_lengths: list[int] | None = None
    mixture: Mapping[str, int] | None = None
    mixture_lengths: list[list[int]] | None = None
    fingerprint: str | None = None
    rows: str | None = None
    cache: str | None = None
    classes: int | None = None
    sequences: int | None = None
    host_memory_bytes: int | None = None
    calibration: "Calibration | None" = None
    batchnorm: Literal["yes", "no", "unknown"] = "no"
    parent: "Parent | None" = None
    start: StartFacts | None = None
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    site: SiteFacts = NO_SITE


def resolve(recipe: Recipe, world: World = World(), *, is_candidate: bool = False) -> Plan:
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
    check_shape(recipe, found, world.row_tokens)
    check_pairs(recipe, world.sequences)
    if shape and world.weights is not None:
        check_weights(recipe, shape, world.weights)
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
    check_padding(recipe, *_whole_config(recipe, world), split.per_device)
    if recipe.model.source in ("config", "factory") or world.model_config is not None:
        check_packing(recipe, _whole_config(recipe, world)[0])
    nodes = layout(recipe, split).nodes
    resolved = _fill(recipe, split, start)
    ramp = batch_equation.split_ramp(recipe.batch, split)
    steps, clock = _steps(recipe, split, world, start)
    batch_equation.check_ramp(recipe.batch, steps.total)
    curve = _curve(recipe, split, steps)
    schedule.check_warmup(curve, clock)
    memory = memory_of(split)
    recipe_sha256, training_sha256 = ("", "") if is_candidate else identity.hashes(resolved)
    counted = None if unseen_code(resolved) or isinstance(seen, str) else seen
    warnings += [*world.problems, *world.notes]
    if recipe.model.compile and memory.method != "unknown":
        warnings.append("memory is estimated without torch.compile, which stores fewer activations")
    warnings += gpu_warnings(recipe, gpu, stated) + memory_warnings(memory, gpu.name)
    plan = Plan(
        plan_version=PLAN_VERSION,
        recipe=resolved,
        recipe_sha256=recipe_sha256,
        training_sha256=training_sha256,
        split_invariance=split_invariance(
            resolved, shape, _whole_config(resolved, world)[1], world.batchnorm
        ),
        batch=BatchFacts(
            effective=split.effective,
            per_device=split.per_device,
            gpus=split.gpus,
            accumulation=split.accumulation,
            remainder=recipe.batch.remainder,
            nodes=nodes,
            ramp=[
                RampFacts(until, own.effective, own.per_device, own.accumulation)
                for until, own in ramp
            ],
        ),
        steps=steps,
        memory=memory,
        schedule=curve,
        cost=cost_of_step(
            resolved,
            split,
            counted,
            _lengths(recipe, world),
            world.weights_bytes,
        ),
        data=DataFacts(
            fingerprint=world.fingerprint,
            rows=world.rows,
            cache=world.cache,
            validation_samples=world.validation_samples,
            row_tokens=world.row_tokens,
            row_lengths=world.row_lengths,
            mixture=mixture,
        ),
        advice=[],
        warnings=warnings
        + batchnorm_warnings(resolved, split, world.batchnorm == "yes")
        + _step_warnings(split, clock)
        + _rate_warnings(recipe, curve, clock)
        + _start_warnings(start, curve, clock)
        + (_model_warnings(recipe, world.parent) if world.parent else [])
        + _noise_warnings(recipe, split),
        start=start,
        site=world.site,
    )
    return plan if is_candidate else with_time(plan, counted, world.calibration)


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


def _steps(
    recipe: Recipe, split: Split, world: World, start: StartFacts | None
) -> tuple[StepFacts, Clock | None]:
    """Counts of optimizer steps, and the Clock, which is None if the number of samples is not known.

    Raises PlanError if the duration cannot be converted to steps without it.
    """
    samples = world.samples if world.samples is not None else recipe.data.samples
    if None not in (world.samples, recipe.data.samples) and world.samples != recipe.data.samples:
        raise PlanError(
            f"data.samples: {recipe.data.samples}, but the prepared data hold {world.samples}. "
            f"Nearest: samples {world.samples}, or samples null"
        )
    is_unknown = start is not None and start.what == "state" and world.fingerprint is None
    if is_unknown:
        samples = None  # whether the samples go on or begin anew is not known yet
    duration, length = recipe.duration, recipe.data.sequence_length
    tokens = tokens_per_step(recipe, split, world.row_lengths)
    if samples is None:
        if duration.steps is None:
            if world.problems:
                raise PlanError("; ".join(world.problems))
            key = "epochs" if duration.epochs else "tokens"
            if is_unknown:
                raise NotPrepared(
                    f"duration.{key}: whether the samples of start_from go on is unknown until the data are "
                    "prepared. Nearest: run `drumline prepare`, or use duration.steps"
                )
            raise NotPrepared(
                f"duration.{key}: the number of steps is unknown until the data are prepared. "
                "Nearest: run `drumline prepare`, or state data.samples, or use duration.steps"
            )
        _need_samples(recipe)
        warmup = _warmup(recipe, duration.steps, None, start)
        return StepFacts(
            samples=None,
            per_epoch=None,
            epochs=None,
            total=duration.steps,
            forwards_per_step=split.accumulation,
            last_batch=None,
            tokens_per_step=tokens,
            warmup=warmup,
        ), None
    clock = clock_of(recipe, samples, split.effective, start)
    if duration.steps:
        total = duration.steps
    elif duration.epochs:
        total = clock.total_for_epochs(duration.epochs)
    else:
        assert duration.tokens and length
        total = clock.total_for_samples(-(-duration.tokens // length))
    if total < clock.first_step:
        raise _nothing_left(recipe, clock)
    regular = replace(clock, start=Place(), ramp=())
    first, stop = regular.slots(regular.steps_per_epoch)
    row = split.per_device * mesh_of(recipe, split.gpus).data_ranks
    widest = min(split.effective, samples) if recipe.batch.remainder != "carry" else split.effective
    return StepFacts(
        samples=samples,
        per_epoch=clock.steps_per_epoch,
        epochs=round(float(clock.epochs_done(total)), 4),
        total=total,
        forwards_per_step=math.ceil(widest / row),
        last_batch=stop - first,
        tokens_per_step=tokens,
        warmup=_warmup(recipe, total, clock, start),
    ), clock


def _lengths(recipe: Recipe, world: World) -> list[int]:
    """Tokens of the rows, as far as they are known: those that were prepared, or one for all rows."""
    length = recipe.data.sequence_length or world.row_tokens
    return world.row_lengths or ([length] if length else [])


def _nothing_left(recipe: Recipe, clock: Clock) -> PlanError:
    done, duration = clock.start, recipe.duration
    whole = math.floor(clock.epochs_done(done.step)) + 1
    length = recipe.data.sequence_length or 1
    stated, more = (
        (f"epochs: {duration.epochs:g}", f"epochs={whole}")
        if duration.epochs
        else (f"tokens: {duration.tokens:,}", f"tokens={2 * done.slot * length}")
    )
    return PlanError(
        f"duration.{stated} are reached at step {done.step:,}, where start_from begins. Nearest: "
        f"duration.{more}"
    )


def _start_warnings(
    start: StartFacts | None, curve: schedule.Curve, clock: Clock | None
) -> list[str]:
    if start is None or (clock is None and curve.unit == "epoch"):
        return []
    from drumline.plan.start import rate_warning

    return rate_warning(start, schedule.rate(curve, start.place.step + 1, clock))


def _model_warnings(recipe: Recipe, parent: "Parent") -> list[str]:
    from drumline.plan.start import model_warnings

    return model_warnings(recipe, parent)


def _need_samples(recipe: Recipe) -> None:
    """PlanError where something is stated in epochs, and how long one is is not known."""
    stated = {
        "evaluation.every_epochs": recipe.evaluation and recipe.evaluation.every_epochs,
        "evaluation.after": next(filter(None, (one.every_epochs for one in recipe.after)), None),
        "checkpoint.every_epochs": recipe.checkpoint.every_epochs,
        "schedule.warmup_epochs": recipe.schedule.warmup_epochs,
    }
    for key, value in stated.items():
        if value is not None:
            raise NotPrepared(
                f"{key}: {value:g} epochs are so many steps as the data have samples. Nearest: run "
                "`drumline prepare`, or state data.samples, or use steps"
            )


def _rate_warnings(recipe: Recipe, curve: schedule.Curve, clock: Clock | None) -> list[str]:
    """Warn where the rates are not those that the recipe's words make one expect."""
    found = []
    begin = clock.first_step if clock else 1
    facts, ratio = schedule.rate_facts(curve, clock, begin), recipe.schedule.warmup_ratio
    if ratio and curve.warmup_steps == 0:
        found.append(
            f"schedule.warmup_ratio: {ratio:g} × {curve.total} steps = {ratio * curve.total:g} rounds to 0, "
            "so there is no warm-up. Nearest: warmup_steps 2"
        )
    if curve.warmup_steps == curve.total > 1 and curve.name not in _WITHOUT_A_MINIMUM:
        found.append(
            f"the warm-up takes all {curve.total:,} steps, so {curve.name} never begins and the minimum is "
            "not reached. Nearest: a shorter warm-up"
        )
    if facts.highest < _NEAR_THE_PEAK * curve.peak_lr and curve.run is None and begin == 1:
        found.append(
            f"the rate never comes near the peak {curve.peak_lr:g}: it is {facts.highest:g} at most"
        )
    if facts.last == 0 and (curve.unit == "epoch" or curve.total == 1):
        what = "last epoch" if curve.unit == "epoch" else "only step"
        found.append(f"the {what} trains at rate 0: set schedule.min_lr_ratio above 0")
    return found


def _noise_warnings(recipe: Recipe, split: Split) -> list[str]:
    is_sharded = recipe.strategy.name == "fsdp"
    if not recipe.logging.noise_scale or is_measurable(is_sharded, split):
        return []
    return ["logging.noise_scale: a step of one micro-batch has nothing to compare; none is logged"]


def _warmup(recipe: Recipe, total: int, clock: Clock | None, start: StartFacts | None) -> int:
    s = recipe.schedule
    steps, key = s.warmup_steps, "warmup_steps"
    if s.warmup_epochs is not None:
        assert clock is not None
        if start and start.what == "state" and not start.continues_data:
            raise PlanError(
                "schedule.warmup_epochs: start_from counts the steps on and has other data, so these epochs "
                "say no step. Nearest: schedule.warmup_epochs=null "
                f"schedule.warmup_steps={clock.first_step + 99}"
            )
        whole = replace(clock, start=Place())  # as of a run that never stopped
        steps, key = whole.total_for_epochs(s.warmup_epochs), "warmup_epochs"
    return schedule.resolve_warmup(steps, s.warmup_ratio, s.name, s.horizon_steps or total, key)


def _step_warnings(split: Split, clock: Clock | None) -> list[str]:
    if clock is None or split.effective <= clock.samples or clock.remainder != "keep":
        return []
    return [
        f"effective {split.effective} > {clock.samples} samples: every step takes all "
        f"{clock.samples} (remainder: keep)"
    ]


def _curve(recipe: Recipe, split: Split, steps: StepFacts) -> schedule.Curve:
    """The schedule with its peak learning rate scaled and its durations in optimizer steps."""
    s, run = recipe.schedule, steps.total
    total = s.horizon_steps or run
    warmup = steps.warmup
    decay = max(1, round(s.decay_ratio * total))
    schedule.check_cycles(s.cycles, total, warmup)
    if s.name == "wsd" and warmup + decay > total:
        raise PlanError(
            f"schedule: warm-up {warmup} + decay {decay} = {warmup + decay} > {total} steps. "
            f"Nearest: {_nearest_decay(warmup, total)}"
        )
    if s.unit == "epoch" and steps.per_epoch is None:
        raise NotPrepared(
            "schedule.unit: epoch needs the number of samples. Nearest: run `drumline prepare`, "
            "or state data.samples, or use unit step"
        )
    peak = recipe.optimizer.lr * _lr_factor(recipe, split)
    if not math.isfinite(peak):
        raise PlanError(
            f"optimizer.lr: {recipe.optimizer.lr:g} × {_lr_factor(recipe, split):g} (lr_scaling) is {peak}. "
            "Nearest: a smaller rate"
        )
    if s.min_lr is not None and s.min_lr > peak:
        raise PlanError(
            f"schedule.min_lr: {s.min_lr:g} > the peak {peak:g}. Nearest: min_lr {peak / 10:g}"
        )
    return schedule.Curve(
        name=s.name,
        base_lr=recipe.optimizer.lr,
        peak_lr=peak,
        min_lr_ratio=s.min_lr_ratio if s.min_lr is None else s.min_lr / peak,
        total=total,
        warmup_steps=warmup,
        unit=s.unit,
        cycles=s.cycles,
        power=s.power,
        decay_steps=decay,
        start_ratio=s.start_ratio,
        milestones=schedule.resolve_milestones(s.milestones, total),
        warmup_start_ratio=s.warmup_start_ratio,
        run=None if total == run else run,
    )


def _nearest_decay(warmup: int, total: int) -> str:
    """A legal fix: a decay that fits after the warm-up or, if none does, a shorter warm-up."""
    ratio = math.floor(1000 * (total - warmup) / total) / 1000
    return f"decay_ratio {ratio:.3f}" if round(ratio * total) else f"a warm-up below {total} steps"


def _lr_factor(recipe: Recipe, split: Split) -> float:
    """Learning rate factor: B / reference_batch (linear; Goyal et al. 2017), its square root, or 1."""
    scaling = recipe.optimizer.lr_scaling
    if scaling.rule == "none" or scaling.reference_batch is None:
        return 1.0
    ratio = split.effective / scaling.reference_batch
    return ratio if scaling.rule == "linear" else math.sqrt(ratio)


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
