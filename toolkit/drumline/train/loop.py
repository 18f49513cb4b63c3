"""The training loop of one rank, from restoring a checkpoint to the last save."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from drumline.after_files import AfterFiles
from drumline.checkpoint.retention import remove_abandoned
from drumline.checkpoint.state import TrainState
from drumline.data.rows import Rows
from drumline.errors import CheckpointError
from drumline.phases import Phase
from drumline.plan import noise, schedule
from drumline.plan.model import Plan
from drumline.train import loader
from drumline.train.anomalies import Judge, find_culprits
from drumline.train.batches import Step, StepReader, open_rows
from drumline.train.commit import SaveCommit
from drumline.train.engines import Engine, build_engine
from drumline.train.evaluate import Evaluator
from drumline.train.forward_timer import ForwardTimer
from drumline.train.forwards import Asked
from drumline.train.garbage import GarbageControl
from drumline.train.metrics import Logbook
from drumline.train.models.build import base_fingerprint
from drumline.train.noise import NoiseMeter, NoMeter, build_meter
from drumline.train.objectives.base import baseline_of
from drumline.train.read_ahead import read_ahead
from drumline.train.reference import attach_reference, needs_reference
from drumline.train.saver import SaveCadence, Saver, is_owed
from drumline.train.scaler import LossScaler
from drumline.train.start import begin_from
from drumline.train.step_reduce import StepReduce, Verdict
from drumline.train.watch import Watch


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `finished`, or `stopped` by a signal or at `until` with its state saved."""

    outcome: str
    step: int
    loss: float | None
    evaluation: dict[str, float] | None
    reason: str = ""


def train(
    plan: Plan,
    run_folder: Path,
    device: torch.device,
    *,
    attempt: int = 0,
    watch: Watch | None = None,
    until: int | None = None,
) -> Outcome:
    """Run this rank of the plan, resuming from the newest sound checkpoint if there is one.

    `until`: save and stop after this step, before the plan's last one.
    """
    recipe, rank, watch = plan.recipe, dist.get_rank(), watch or Watch()
    rows = open_rows(plan, "train")
    watch.enter(Phase.BUILDING)
    built = partial(watch.enter, Phase.BUILDING)
    engine = build_engine(plan, rows.manifest, device, progress=built)
    reader = StepReader(plan, rows, rank, pin=device.type == "cuda")
    evaluator = Evaluator(plan, engine)
    try:
        state, suspect = _begin(engine, plan, run_folder, watch, {"train": rows, **evaluator.parts})
    except Asked:
        return Outcome("stopped", step=0, loss=None, evaluation=None)
    logbook = Logbook(plan, run_folder / "metrics.jsonl", device, state, engine.step_metrics)
    saver = _saver(plan, run_folder, attempt, state.step, logbook)
    judge = Judge(recipe.anomalies, state, suspect)
    clock = plan.clock()
    cadence = SaveCadence(recipe.checkpoint, clock, recipe.after)
    meter, timer = build_meter(plan, engine), ForwardTimer(device)
    course = _Course(stop=False, reason=_reason_to_stop(state, plan))

    watch.enter(Phase.WARMING_UP)
    engine.warm_up(reader.widest().tensors)
    with logbook, saver, GarbageControl() as garbage:
        if state.evaluation_due:
            _evaluate(evaluator, state, plan, watch, logbook, course)
            if not course.stop and state.step >= plan.first_step:
                saver.amend(state)
        first = plan.steps.total + 1 if course.is_over else state.step + 1
        workers = recipe.data.workers or 0
        for step in logbook.timed(
            watch.reading(read_ahead(reader, first, plan.steps.total, workers))
        ):
            watch.begin(step.number)
            losses = forward_backward(engine, step, watch, meter, timer)
            watch.enter(Phase.REDUCING)
            sums = torch.stack(losses).sum(dim=0)
            reduce = StepReduce(
                (sums if sums.ndim == 0 else sums[0]) / step.weight,
                stop=watch.stop_asked(),
                save_due=cadence.time_is_up(),
                save_failed=saver.has_failed,
                extra_sums=meter.measured(),
                beside_loss=sums[1:] if sums.ndim else None,
            )
            norm = engine.clip(recipe.optimizer.max_grad_norm)
            verdict = reduce.wait(norm)
            watch.busy_s = timer.total()
            course.stop = verdict.stop or step.number == until
            watch.enter(Phase.UPDATING)
            judgement = judge.judge(step.number, verdict, engine.scaler)
            rate = schedule.rate(plan.schedule, step.number, clock)
            engine.skip() if judgement.skip else engine.step(rate)
            place = clock.place(step.number)
            state.advance(step.number, place.consumed, step.tokens, verdict.loss)
            state.slot, state.own_samples = place.slot, place.of_these
            _add_noise(state, step, verdict)
            odd = judgement.why and judgement.why != "overflow"
            culprits = (
                find_culprits(step, [float(loss.flatten()[0]) for loss in losses]) if odd else {}
            )
            logbook.record(step, state, verdict, rate, judgement, culprits, watch.spent())
            watch.finish()
            judge.raise_if_hopeless(step.number)
            garbage.after_step(step.number)

            last = step.number == plan.steps.total
            state.evaluation_due = evaluator.is_due(step.number, last)
            if state.evaluation_due and not course.stop:
                _evaluate(evaluator, state, plan, watch, logbook, course)
                garbage.at_pause()
            if verdict.save_failed:
                _hear_errors(saver, state, logbook, watch)
            if last or course.is_over or verdict.save_due or cadence.is_due(state):
                logbook.flush()
                _hear_errors(saver, state, logbook, watch)
                ends = last or bool(course.reason) or step.number == until
                _save(engine, saver, state, watch, is_final=ends)
                cadence.saved()
                garbage.at_pause()
            if course.is_over:
                break
        _wait_for_save(saver, watch)
        if saver.has_failed:
            raise CheckpointError(f"the last save failed: {saver.take_errors()[-1]}")
        if spent := watch.spent():
            logbook.record_event(state.step, **spent)

    complete = state.step == plan.steps.total and not state.evaluation_due
    return Outcome(
        outcome="finished" if complete or course.reason else "stopped",
        step=state.step,
        loss=state.loss,
        evaluation=state.evaluation,
        reason=course.reason,
    )


@dataclass
class _Course:
    """Whether the loop ends: `stop` on a signal or at `until`, `reason` on early stopping (else empty)."""

    stop: bool
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.stop or bool(self.reason)


def forward_backward(
    engine: Engine,
    step: Step,
    watch: Watch,
    meter: NoiseMeter | None = None,
    timer: ForwardTimer | None = None,
) -> list[Tensor]:
    """Run all micro-batches of one step on this rank; returns what `Engine.accumulate` does, of each."""
    if baseline_of(engine.module.objective):
        watch.enter(Phase.FORWARD, "the baseline")
    engine.measure_baseline([one.tensors for one in step.micro_batches])
    losses, meter, timer = [], meter or NoMeter(), timer or ForwardTimer(engine.device)
    count = len(step.micro_batches)
    for number, micro_batch in enumerate(step.micro_batches, start=1):
        which = f"micro-batch {number} of {count}"
        watch.enter(Phase.FORWARD, which)
        meter.before(micro_batch, step)
        timer.start()

        def before_backward(which: str = which) -> None:
            timer.stop()
            watch.enter(Phase.BACKWARD, which)

        loss = engine.accumulate(
            micro_batch.tensors,
            micro_batch.first_slot,
            step.weight,
            step=step.number,
            dummy=micro_batch.is_dummy,
            last=number == count,
            before_backward=before_backward,
        )
        meter.after(number, step)
        losses.append(loss)
    return losses


def _evaluate(
    evaluator: Evaluator,
    state: TrainState,
    plan: Plan,
    watch: Watch,
    logbook: Logbook,
    course: _Course,
) -> None:
    """Evaluate and apply early stopping; after a signal the evaluation stays due for the next attempt."""
    found = evaluator.run(watch)
    if found is None:
        course.stop = True
        return
    state.evaluation_due, state.evaluation = False, found
    course.reason = _judge(state, found, plan)
    logbook.record_evaluation(state.step, found)


def _add_noise(state: TrainState, step: Step, verdict: Verdict) -> None:
    """Append this step's noise-scale pair, if one was measured, to the window of the last steps."""
    if verdict.extra_sums and verdict.finite:
        whole = verdict.grad_norm**2
        pair = noise.step_pair(verdict.extra_sums, whole, step.weight, step.samples)
        if pair:
            state.noise = [*state.noise, pair][-noise.WINDOW :]


def _saver(plan: Plan, folder: Path, attempt: int, saved_step: int, logbook: Logbook) -> Saver:
    rank, recipe = dist.get_rank(), plan.recipe
    store = dist.distributed_c10d._get_default_store()
    commit = SaveCommit(store, f"{folder.name}-{attempt}", rank, plan.mesh.ranks)
    return Saver(
        folder / "checkpoints",
        recipe.checkpoint,
        commit,
        rank,
        saved_step=saved_step,
        before_publishing=logbook.sync,
        published=logbook.record_save,
        recipe=recipe.model_dump(by_alias=True),
        waits=_waiting_for_commands(plan, folder),
    )


def _waiting_for_commands(plan: Plan, folder: Path) -> Callable[[int], bool]:
    """Whether a command of `evaluation.after` has yet to read the checkpoint of a step."""
    files, clock = AfterFiles(folder), plan.clock()

    def waits(step: int) -> bool:
        return any(
            is_owed(step, [one], clock) and not files.is_done(step, one.label)
            for one in plan.recipe.after
        )

    return waits


def _save(engine: Engine, saver: Saver, state: TrainState, watch: Watch, is_final: bool) -> None:
    if engine.scaler:
        state.loss_scale = vars(engine.scaler).copy()
    shards = engine.shards()
    watch.enter(Phase.SAVING, limit_s=saver.limit_of(shards))
    saver.save(shards, state, is_final)


def _wait_for_save(saver: Saver, watch: Watch) -> None:
    """Wait until the save in progress is committed or refused, within the saver's own time limit."""
    watch.enter(Phase.SAVING, limit_s=saver.limit_s())
    saver.wait(watch.wait)


def _hear_errors(saver: Saver, state: TrainState, logbook: Logbook, watch: Watch) -> None:
    """Wait for the save in progress and log its errors; where `on_error` is `stop`, all ranks raise."""
    _wait_for_save(saver, watch)
    for error in saver.take_errors():
        logbook.record_event(state.step, **{"checkpoint/error": error})


def _judge(state: TrainState, evaluation: dict[str, float], plan: Plan) -> str:
    """Update the best metric and the patience count; returns the reason to stop early, or "".

    Any gain updates the best metric; only a gain above `min_delta` resets the patience count. A value that
    is not finite does neither.
    """
    rule = plan.recipe.early_stopping
    metric = rule.metric if rule else "eval/loss"
    mode = rule.mode if rule and rule.mode else "min"
    value = evaluation[metric]
    state.metric, state.metric_mode = value, mode
    if _gain(value, state.best_metric, mode) > 0:
        state.best_metric, state.is_best = value, True
    if _gain(value, state.patience_metric, mode) > (rule.min_delta if rule else 0.0):
        state.patience_metric, state.evaluations_without_gain = value, 0
    else:
        state.evaluations_without_gain += 1
    return _reason_to_stop(state, plan)


def _reason_to_stop(state: TrainState, plan: Plan) -> str:
    """The reason for which early stopping ends the run now, or ""."""
    rule = plan.recipe.early_stopping
    if not rule or state.evaluations_without_gain < rule.patience:
        return ""
    return (
        f"early stopping: {rule.metric} has not improved on {state.patience_metric} by more than "
        f"{rule.min_delta:g} for {rule.patience} evaluations"
    )


def _gain(value: float, reference: float | None, mode: str) -> float:
    """How much better than the reference: inf without a reference, -inf for a non-finite value."""
    if not math.isfinite(value):
        return -math.inf
    if reference is None:
        return math.inf
    return reference - value if mode == "min" else value - reference


def _begin(
    engine: Engine, plan: Plan, run_folder: Path, watch: Watch, parts: dict[str, Rows]
) -> tuple[TrainState, str | None]:
    """`_restore`; and the log-probabilities of the reference for these parts, if the objective needs them.

    They are of the weights before training, so they come before a checkpoint is loaded, or after that which
    the run begins from. Raises `Asked` when any rank was asked to stop.
    """
    has_reference = needs_reference(plan)
    if has_reference and plan.start is None:
        attach_reference(plan, engine, parts, watch)
    watch.enter(Phase.LOADING)
    state, suspect = _restore(engine, plan, run_folder, watch)
    if has_reference and plan.start is not None:
        is_begun = state.step > plan.start.place.step
        attach_reference(plan, engine, parts, watch, is_begun=is_begun)
    return state, suspect


def _restore(
    engine: Engine, plan: Plan, run_folder: Path, watch: Watch
) -> tuple[TrainState, str | None]:
    """Load the newest sound checkpoint; returns its state, or a fresh one where there is none.

    Also returns the checkpoint's name if an older one exists to fall back to, else None.
    """
    folder = run_folder / "checkpoints"
    if dist.get_rank() == 0:
        remove_abandoned(folder)
    chosen = loader.choose(folder, run_folder / "metrics.jsonl")
    base = [base_fingerprint(plan.recipe) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(base, src=0)
    if chosen.path is None:
        fresh = TrainState(
            training_sha256=plan.training_sha256,
            fingerprint=plan.data.fingerprint,
            rows=plan.data.rows,
            base=base[0],
            evaluation_due=bool(plan.recipe.row_evaluation and plan.recipe.row_evaluation.at_start),
        )
        if plan.start:
            fresh = begin_from(engine, plan, fresh)
            watch.step = watch.done = fresh.step
        return fresh, None
    path, state = chosen.path, chosen.state
    watch.step = watch.done = state.step
    for what, saved, here in (
        ("training_sha256", state.training_sha256, plan.training_sha256),
        ("data fingerprint", state.fingerprint, plan.data.fingerprint),
        (f"weights of {plan.recipe.model.name or plan.recipe.model.path}", state.base, base[0]),
    ):
        if saved != here:
            raise CheckpointError(
                f"{path} belongs to another training: {what} {saved}, here {here}"
            )
    loader.load(path, engine.shards())
    engine.loaded()
    watch.begun({"from_step": state.step, "checkpoint": path.name, "set_aside": chosen.set_aside})
    print(f"going on from step {state.step}, loaded from {path}", flush=True)
    if state.loss_scale:
        engine.scaler = LossScaler(**state.loss_scale)
    return state, path.name if chosen.has_older else None
