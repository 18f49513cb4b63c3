"""The training loop, one story from the first step to the last."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.data.rows import Rows
from toolkit.errors import CheckpointError, RunError
from toolkit.plan import schedule
from toolkit.plan.model import Plan
from toolkit.train import checkpoint
from toolkit.train.agreement import Agreement
from toolkit.train.batches import Step, StepReader, read_ahead
from toolkit.train.checkpoint import SaveCadence, Saver, TrainState
from toolkit.train.engines.torch import TorchEngine
from toolkit.train.evaluate import Evaluator
from toolkit.train.metrics import Logbook
from toolkit.train.scaler import LossScaler

LONGEST_NON_FINITE_RUN = 20


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
    begin_step: Callable[[int], bool] = lambda step: False,
) -> Outcome:
    """Train what the plan says, from the newest sound checkpoint if there is one, on this rank.

    `begin_step` is told of each step as it begins; true asks all ranks to stop after it.
    """
    recipe, rank = plan.recipe, dist.get_rank()
    assert plan.data.cache
    rows = Rows(Path(plan.data.cache), "train")
    engine = TorchEngine(plan, rows.card, device)
    reader = StepReader(plan, rows, rank, pin=device.type == "cuda")
    state = _restore(engine, plan, run_folder / "checkpoints")
    saver = Saver(run_folder / "checkpoints", rank, plan.batch.gpus, attempt, recipe.checkpoint)
    evaluator = Evaluator(plan, engine)
    logbook = Logbook(plan, run_folder / "metrics.jsonl", device, resume_at=state.step)
    cadence = SaveCadence(recipe.checkpoint)
    clock = plan.clock()
    loss, evaluation, reason = None, None, ""

    engine.warm_up(reader.widest().tensors)
    with logbook:
        for step in logbook.timed(read_ahead(reader, state.step + 1, plan.steps.total)):
            stop_asked = begin_step(step.number)
            total = _forward_backward(engine, step)
            agreement = Agreement(total / step.weight, stop_asked, cadence.time_is_up())
            norm = engine.clip(recipe.optimizer.max_grad_norm)
            verdict = agreement.reach(norm)
            rate = schedule.rate(plan.schedule, step.number, clock)
            if verdict.finite:
                engine.step(rate)
            engine.zero_grad()
            if engine.scaler:
                engine.scaler.update(verdict.finite)
            state.advance(step.number, clock.consumed(step.number), step.tokens, verdict.finite)
            loss = verdict.loss
            logbook.record(step, state, verdict, rate)

            last = step.number == plan.steps.total
            evaluated = evaluator.is_due(step.number) or (last and evaluator.enabled)
            if evaluated:
                evaluation = evaluator.run()
                reason = _judge(state, evaluation, plan)
                logbook.record_evaluation(step.number, evaluation)
            ending = last or verdict.stop or bool(reason)
            if ending or verdict.save_due or cadence.is_due(state):
                logbook.flush()
                _save(engine, saver, state)
                cadence.saved()
            if state.skipped_in_a_row >= LONGEST_NON_FINITE_RUN:
                raise RunError(
                    f"step {step.number}: loss or gradient not finite {state.skipped_in_a_row} steps in a row"
                )
            if ending:
                break

    saver.wait()
    stopped = state.step < plan.steps.total and not reason
    return Outcome("stopped" if stopped else "finished", state.step, loss, evaluation, reason)


def _forward_backward(engine: TorchEngine, step: Step) -> Tensor:
    """All micro-batches of one step on this rank; their undivided sum of losses, on the device."""
    total = torch.zeros((), device=engine.device)
    last = len(step.micro_batches) - 1
    for number, micro_batch in enumerate(step.micro_batches):
        total += engine.accumulate(
            micro_batch.tensors,
            micro_batch.first_slot,
            step.weight,
            step=step.number,
            dummy=micro_batch.is_dummy,
            last=number == last,
        )
    return total


def _save(engine: TorchEngine, saver: Saver, state: TrainState) -> None:
    if engine.scaler:
        state.loss_scale = vars(engine.scaler).copy()
    saver.save(engine.pieces(), state)


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
    if rule and state.evaluations_without_gain >= rule.patience:
        return (
            f"early stopping: {metric} has not improved on {state.patience_metric} by more than "
            f"{rule.min_delta:g} for {rule.patience} evaluations"
        )
    return ""


def _gain(value: float, reference: float | None, mode: str) -> float:
    """How much better than the reference; infinite against none, never from a non-finite value."""
    if not math.isfinite(value):
        return -math.inf
    if reference is None:
        return math.inf
    return reference - value if mode == "min" else value - reference


def _restore(engine: TorchEngine, plan: Plan, folder: Path) -> TrainState:
    """The state of the newest sound checkpoint, loaded; a fresh one where there is none.

    Rank 0 verifies and chooses; all ranks load the same.
    """
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        checkpoint.remove_abandoned(folder)
        found = checkpoint.newest_sound(folder, lambda line: print(line, flush=True))
        chosen = [str(found[0]) if found else None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return TrainState(training_sha256=plan.training_sha256, fingerprint=plan.data.fingerprint)
    path = Path(chosen[0])
    state = checkpoint.read_state(path)
    for what, saved, here in (
        ("training_sha256", state.training_sha256, plan.training_sha256),
        ("data fingerprint", state.fingerprint, plan.data.fingerprint),
    ):
        if saved != here:
            raise CheckpointError(
                f"{path} belongs to another training: {what} {saved}, here {here}"
            )
    checkpoint.load(path, engine.pieces())
    if state.loss_scale:
        engine.scaler = LossScaler(**state.loss_scale)
    return state
