"""The training loop of one rank, from restoring a checkpoint to the last save."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from drumline.after_files import AfterFiles
from drumline.checkpoint.state import TrainState
from drumline.errors import CheckpointError
from drumline.phases import Phase
from drumline.plan import noise, schedule
from drumline.plan.model import Plan
from drumline.plan.steps import Clock
from drumline.train.anomalies import Judge, find_culprits
from drumline.train.batches import Step, StepReader, open_rows
from drumline.train.commit import SaveCommit
from drumline.train.early_stopping import judge_evaluation, reason_to_stop
from drumline.train.engines import Engine, build_engine
from drumline.train.evaluate import Evaluator
from drumline.train.forward_timer import ForwardTimer
from drumline.train.forwards import Asked
from drumline.train.garbage import GarbageControl
from drumline.train.metrics import Logbook
from drumline.train.noise import NoiseMeter, NoMeter, build_meter
from drumline.train.objectives.base import baseline_of
from drumline.train.read_ahead import read_ahead
from drumline.train.restore import restored
from drumline.train.saver import SaveCadence, Saver, is_owed
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
        state, suspect = restored(
            engine, plan, run_folder, watch, {"train": rows, **evaluator.parts}
        )
    except Asked:
        return Outcome("stopped", step=0, loss=None, evaluation=None)
    logbook = Logbook(plan, run_folder / "metrics.jsonl", device, state, engine.step_metrics)
    saver = _saver(plan, run_folder, attempt, state.step, logbook)
    saver.begin(engine.shards())
    clock = plan.clock()
    loop = _Loop(
        plan=plan,
        engine=engine,
        evaluator=evaluator,
        state=state,
        watch=watch,
        logbook=logbook,
        saver=saver,
        judge=Judge(recipe.anomalies, state, suspect),
        clock=clock,
        cadence=SaveCadence(recipe.checkpoint, clock, recipe.after),
        meter=build_meter(plan, engine),
        timer=ForwardTimer(device),
        course=_Course(stop=False, reason=reason_to_stop(state, plan)),
        until=until,
    )
    watch.enter(Phase.WARMING_UP)
    engine.warm_up(reader.widest().tensors)
    with logbook, saver, GarbageControl() as garbage:
        first = loop.begin()
        steps = read_ahead(reader, first, plan.steps.total, recipe.data.workers or 0)
        for step in logbook.timed(watch.reading(steps)):
            watch.begin(step.number)
            verdict = loop.step(step)
            garbage.after_step(step.number)
            if loop.pause(step.number, verdict):
                garbage.at_pause()
            if loop.course.is_over:
                break
        loop.end()
    return loop.outcome()


@dataclass
class _Course:
    """Whether the loop ends: `stop` on a signal or at `until`, `reason` on early stopping (else empty)."""

    stop: bool
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.stop or bool(self.reason)


@dataclass
class _Loop:
    """What a rank trains with, and what it does in each step; `until`: see `train`."""

    plan: Plan
    engine: Engine
    evaluator: Evaluator
    state: TrainState
    watch: Watch
    logbook: Logbook
    saver: Saver
    judge: Judge
    clock: Clock
    cadence: SaveCadence
    meter: NoiseMeter
    timer: ForwardTimer
    course: "_Course"
    until: int | None

    def begin(self) -> int:
        """Evaluate what an earlier attempt owed, and return the first step to train."""
        if self.state.evaluation_due:
            self._evaluate()
            if not self.course.stop and self.state.step >= self.plan.first_step:
                self.saver.amend(self.state)
        return self.plan.steps.total + 1 if self.course.is_over else self.state.step + 1

    def step(self, step: Step) -> Verdict:
        """One optimizer step: forward, backward, one reduction, the verdict, the update, its record."""
        engine, state, watch = self.engine, self.state, self.watch
        losses = forward_backward(engine, step, watch, self.meter, self.timer)
        watch.enter(Phase.REDUCING)
        sums = torch.stack(losses).sum(dim=0)
        reduce = StepReduce(
            (sums if sums.ndim == 0 else sums[0]) / step.weight,
            stop=watch.stop_asked(),
            save_due=self.cadence.time_is_up(),
            save_failed=self.saver.has_failed,
            extra_sums=self.meter.measured(),
            beside_loss=sums[1:] if sums.ndim else None,
        )
        norm = engine.clip(self.plan.recipe.optimizer.max_grad_norm)
        verdict = reduce.wait(norm)
        watch.busy_s = self.timer.total()
        self.course.stop = verdict.stop or step.number == self.until
        watch.enter(Phase.UPDATING)
        judgement = self.judge.judge(step.number, verdict, engine.scaler)
        rate = schedule.rate(self.plan.schedule, step.number, self.clock)
        engine.skip() if judgement.skip else engine.step(rate)
        place = self.clock.place(step.number)
        state.advance(step.number, place.consumed, step.tokens, verdict.loss)
        state.slot, state.own_samples = place.slot, place.of_these
        _add_noise(state, step, verdict)
        odd = judgement.why and judgement.why != "overflow"
        culprits = find_culprits(step, [float(loss.flatten()[0]) for loss in losses]) if odd else {}
        self.logbook.record(step, state, verdict, rate, judgement, culprits, watch.spent())
        watch.finish()
        self.judge.raise_if_hopeless(step.number)
        return verdict

    def pause(self, number: int, verdict: Verdict) -> bool:
        """Evaluate and save, if it is time for it after this step; whether it was."""
        last = number == self.plan.steps.total
        paused = False
        self.state.evaluation_due = self.evaluator.is_due(number, last)
        if self.state.evaluation_due and not self.course.stop:
            self._evaluate()
            paused = True
        if verdict.save_failed:
            self._hear_errors()
        if last or self.course.is_over or verdict.save_due or self.cadence.is_due(self.state):
            self.logbook.flush()
            self._hear_errors()
            self._save(is_final=last or bool(self.course.reason) or number == self.until)
            self.cadence.saved()
            paused = True
        return paused

    def end(self) -> None:
        """Wait for the last save; CheckpointError if it failed."""
        self._wait_for_save()
        if self.saver.has_failed:
            raise CheckpointError(f"the last save failed: {self.saver.take_errors()[-1]}")
        if spent := self.watch.spent():
            self.logbook.record_event(self.state.step, **spent)

    def outcome(self) -> Outcome:
        """How the attempt has ended."""
        state, reason = self.state, self.course.reason
        complete = state.step == self.plan.steps.total and not state.evaluation_due
        return Outcome(
            outcome="finished" if complete or reason else "stopped",
            step=state.step,
            loss=state.loss,
            evaluation=state.evaluation,
            reason=reason,
        )

    def _evaluate(self) -> None:
        """Evaluate and apply early stopping; after a signal the evaluation stays due for the next attempt."""
        found = self.evaluator.run(self.watch)
        if found is None:
            self.course.stop = True
            return
        self.state.evaluation_due, self.state.evaluation = False, found
        self.course.reason = judge_evaluation(self.state, found, self.plan)
        self.logbook.record_evaluation(self.state.step, found)

    def _save(self, is_final: bool) -> None:
        if self.engine.scaler:
            self.state.loss_scale = vars(self.engine.scaler).copy()
        shards = self.engine.shards()
        self.watch.enter(Phase.SAVING, limit_s=self.saver.limit_of(shards))
        self.saver.save(shards, self.state, is_final)

    def _wait_for_save(self) -> None:
        """Wait until the save in progress is committed or refused, within the saver's own time limit."""
        self.watch.enter(Phase.SAVING, limit_s=self.saver.limit_s())
        self.saver.wait(self.watch.wait)

    def _hear_errors(self) -> None:
        """Wait for the save in progress and log its errors; where `on_error` is `stop`, all ranks raise."""
        self._wait_for_save()
        for error in self.saver.take_errors():
            self.logbook.record_event(self.state.step, **{"checkpoint/error": error})


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
