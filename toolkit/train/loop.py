"""The training loop, one story from the first step to the last."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.checkpoint.shelf import remove_abandoned
from toolkit.checkpoint.state import TrainState
from toolkit.data.rows import Rows
from toolkit.errors import CheckpointError
from toolkit.plan import noise, schedule
from toolkit.plan.model import Plan
from toolkit.train import loader
from toolkit.train.agreement import Agreement, Verdict
from toolkit.train.anomalies import Judge, find_culprits
from toolkit.train.batches import Step, StepReader, read_ahead
from toolkit.train.busy import BusyClock
from toolkit.train.engines import Engine, build_engine
from toolkit.train.evaluate import Evaluator
from toolkit.train.metrics import Logbook
from toolkit.train.noise import NoiseMeter, NoMeter, build_meter
from toolkit.train.saver import SaveCadence, Saver
from toolkit.train.scaler import LossScaler
from toolkit.train.votes import Votes
from toolkit.train.watch import Watch


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `finished`, or `stopped` on a signal with a checkpoint saved."""

    outcome: str
    step: int
    loss: float | None
    evaluation: dict[str, float] | None
    reason: str = ""


def train(
    plan: Plan,
    run_folder: Path,
    device: torch.device,
    attempt: int = 0,
    watch: Watch | None = None,
    until: int | None = None,
) -> Outcome:
    """Train what the plan says, from the newest sound checkpoint if there is one, on this rank.

    `until`: save and stop after this step, although the plan goes on.
    """
    recipe, rank, watch = plan.recipe, dist.get_rank(), watch or Watch()
    assert plan.data.cache
    rows = Rows(Path(plan.data.cache), "train")
    watch.at("model")
    engine = build_engine(plan, rows.card, device)
    reader = StepReader(plan, rows, rank, pin=device.type == "cuda")
    watch.at("load")
    state, suspect = _restore(engine, plan, run_folder / "checkpoints", watch)
    logbook = Logbook(plan, run_folder / "metrics.jsonl", device, state)
    saver = _saver(plan, run_folder, attempt, state.step, logbook)
    evaluator = Evaluator(plan, engine)
    judge = Judge(recipe.anomalies, state, suspect)
    cadence = SaveCadence(recipe.checkpoint)
    meter, busy = build_meter(plan, engine), BusyClock(device)
    clock = plan.clock()
    course = _Course(stop=False, reason=_reason_to_stop(state, plan))

    watch.at("warm-up")
    engine.warm_up(reader.widest().tensors)
    with logbook, saver:
        if state.evaluation_due:
            _evaluate(evaluator, state, plan, watch, logbook, course)
            if not course.stop:
                saver.amend(state)
        first = plan.steps.total + 1 if course.is_over else state.step + 1
        for step in logbook.timed(read_ahead(reader, first, plan.steps.total)):
            watch.begin(step.number)
            losses = forward_backward(engine, step, watch, meter, busy)
            watch.at("agreement")
            total = torch.stack(losses).sum() / step.weight
            asked = watch.stop_asked(), cadence.time_is_up(), saver.has_failed
            agreement = Agreement(total, *asked, meter.measured())
            norm = engine.clip(recipe.optimizer.max_grad_norm)
            verdict = agreement.reach(norm)
            watch.busy_s = busy.total()
            course.stop = verdict.stop or step.number == until
            watch.at("update")
            judgement = judge.judge(step.number, verdict, engine.scaler)
            rate = schedule.rate(plan.schedule, step.number, clock)
            engine.skip() if judgement.skip else engine.step(rate)
            state.advance(step.number, clock.consumed(step.number), step.tokens, verdict.loss)
            _add_noise(state, step, verdict)
            odd = judgement.why and judgement.why != "overflow"
            culprits = find_culprits(step, [float(loss) for loss in losses]) if odd else {}
            logbook.record(step, state, verdict, rate, judgement, culprits)
            watch.finish()
            judge.raise_if_hopeless(step.number)

            last = step.number == plan.steps.total
            state.evaluation_due = evaluator.is_due(step.number, last)
            if state.evaluation_due and not course.stop:
                _evaluate(evaluator, state, plan, watch, logbook, course)
            if verdict.save_failed:
                _hear_errors(saver, state, logbook, watch)
            if last or course.is_over or verdict.save_due or cadence.is_due(state):
                watch.at("save")
                logbook.flush()
                _hear_errors(saver, state, logbook, watch)
                _save(engine, saver, state)
                cadence.saved()
            if course.is_over:
                break
        saver.wait(watch.wait)
        if saver.has_failed:
            raise CheckpointError(f"the last save failed: {saver.take_errors()[-1]}")

    complete = state.step == plan.steps.total and not state.evaluation_due
    outcome = "finished" if complete or course.reason else "stopped"
    return Outcome(outcome, state.step, state.loss, state.evaluation, course.reason)


@dataclass
class _Course:
    """Whether the loop goes on: a signal, or the reason to stop early."""

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
    busy: BusyClock | None = None,
) -> list[Tensor]:
    """All micro-batches of one step on this rank; the undivided loss of each, on the device."""
    losses, meter, busy = [], meter or NoMeter(), busy or BusyClock(engine.device)
    count = len(step.micro_batches)
    for number, micro_batch in enumerate(step.micro_batches, start=1):
        watch.at(f"forward of micro-batch {number} of {count}")
        meter.before(micro_batch, step)
        busy.start()

        def before_backward(place: str = f"backward of micro-batch {number} of {count}") -> None:
            busy.stop()
            watch.at(place)

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
    """Evaluate and judge; a signal meanwhile leaves it due, for the next attempt to do."""
    found = evaluator.run(watch)
    if found is None:
        course.stop = True
        return
    state.evaluation_due, state.evaluation = False, found
    course.reason = _judge(state, found, plan)
    logbook.record_evaluation(state.step, found)


def _add_noise(state: TrainState, step: Step, verdict: Verdict) -> None:
    """What this step tells of the noise scale, if it was measured, into the window of the last ones."""
    if verdict.beside and verdict.finite:
        whole = verdict.grad_norm**2
        pair = noise.step_pair(verdict.beside, whole, step.weight, step.samples)
        if pair:
            state.noise = [*state.noise, pair][-noise.WINDOW :]


def _saver(plan: Plan, folder: Path, attempt: int, saved_step: int, logbook: Logbook) -> Saver:
    rank, recipe = dist.get_rank(), plan.recipe
    store = dist.distributed_c10d._get_default_store()
    name = f"{folder.name}-{attempt}"
    votes = Votes(store, name, rank, plan.batch.gpus, recipe.launch.hang_timeout_s)
    told = logbook.sync, logbook.record_save, recipe.model_dump(by_alias=True)
    return Saver(folder / "checkpoints", recipe.checkpoint, votes, rank, saved_step, *told)


def _save(engine: Engine, saver: Saver, state: TrainState) -> None:
    if engine.scaler:
        state.loss_scale = vars(engine.scaler).copy()
    saver.save(engine.pieces(), state)


def _hear_errors(saver: Saver, state: TrainState, logbook: Logbook, watch: Watch) -> None:
    """Wait for the save under way; where it failed, all ranks stop or go on alike, and it is told."""
    saver.wait(watch.wait)
    for error in saver.take_errors():
        logbook.record_event(state.step, **{"checkpoint/error": error})


def _judge(state: TrainState, evaluation: dict[str, float], plan: Plan) -> str:
    """Update the best metric and the patience; why to stop early, or nothing.

    The best is the best of all; patience starts anew only on a gain above min_delta. A value that is
    not finite is neither.
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
    """Why early stopping ends the run now, or nothing."""
    rule = plan.recipe.early_stopping
    if not rule or state.evaluations_without_gain < rule.patience:
        return ""
    return (
        f"early stopping: {rule.metric} has not improved on {state.patience_metric} by more than "
        f"{rule.min_delta:g} for {rule.patience} evaluations"
    )


def _gain(value: float, reference: float | None, mode: str) -> float:
    """How much better than the reference; infinite against none, never from a non-finite value."""
    if not math.isfinite(value):
        return -math.inf
    if reference is None:
        return math.inf
    return reference - value if mode == "min" else value - reference


def _restore(
    engine: Engine, plan: Plan, folder: Path, watch: Watch
) -> tuple[TrainState, str | None]:
    """The state of the newest sound checkpoint, loaded; a fresh one where there is none.

    Also the checkpoint's name, where it can be doubted because there is one before it.
    """
    if dist.get_rank() == 0:
        remove_abandoned(folder)
    chosen = loader.choose(folder)
    if chosen.path is None:
        fresh = TrainState(training_sha256=plan.training_sha256, fingerprint=plan.data.fingerprint)
        return fresh, None
    path, state = chosen.path, chosen.state
    watch.step = watch.done = state.step
    for what, saved, here in (
        ("training_sha256", state.training_sha256, plan.training_sha256),
        ("data fingerprint", state.fingerprint, plan.data.fingerprint),
    ):
        if saved != here:
            raise CheckpointError(
                f"{path} belongs to another training: {what} {saved}, here {here}"
            )
    loader.load(path, engine.pieces())
    engine.loaded()
    watch.begun({"from_step": state.step, "checkpoint": path.name, "set_aside": chosen.set_aside})
    print(f"going on from step {state.step}, loaded from {path}", flush=True)
    if state.loss_scale:
        engine.scaler = LossScaler(**state.loss_scale)
    return state, path.name if chosen.has_older else None
