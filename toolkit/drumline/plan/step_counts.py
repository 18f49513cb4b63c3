"""How many optimizer steps a plan runs, and its schedule in steps. Pure."""

import math
from dataclasses import replace

from drumline.errors import NotPrepared, PlanError
from drumline.plan import schedule
from drumline.plan.batch import Split
from drumline.plan.mesh import mesh_of
from drumline.plan.model import StartFacts, StepFacts, clock_of
from drumline.plan.steps import Clock, Place
from drumline.plan.work import tokens_per_step
from drumline.plan.world import World
from drumline.recipe.schema import Recipe


def step_facts(
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


def curve_of(recipe: Recipe, split: Split, steps: StepFacts) -> schedule.Curve:
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
