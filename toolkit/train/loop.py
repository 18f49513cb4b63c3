"""The training loop, one story from the first step to the last."""

import math
import time
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
from toolkit.train.batches import Step, StepReader, read_ahead
from toolkit.train.checkpoint import Saver, TrainState
from toolkit.train.engines.torch import TorchEngine
from toolkit.train.evaluate import Evaluator
from toolkit.train.memory import MemoryGauge
from toolkit.train.metrics import MetricsFile
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


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on about one step: the only meeting of host and device in it."""

    loss: float
    grad_norm: float
    stop: bool
    save_due: bool

    @property
    def finite(self) -> bool:
        """Whether the update may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Agreement:
    """Sums the loss over ranks, and lets one rank's signal or rank 0's clock speak for all.

    Under way while the gradient is clipped; `reach` is the step's one wait for the device.
    """

    def __init__(self, loss: Tensor, stop: bool, save_due: bool) -> None:
        flags = torch.tensor([float(stop), float(save_due)], device=loss.device)
        self._shared = torch.cat([loss.reshape(1), flags])
        self._work = dist.all_reduce(self._shared, async_op=True)

    def reach(self, norm: Tensor) -> Verdict:
        """The verdict on the step, equal on every rank."""
        self._work.wait()
        loss, stops, saves, grad_norm = torch.cat([self._shared, norm.reshape(1)]).tolist()
        return Verdict(loss, grad_norm, stops > 0, saves > 0)


def train(
    plan: Plan,
    run_folder: Path,
    device: torch.device,
    attempt: int = 0,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train what the plan says, from the newest sound checkpoint if there is one, on this rank."""
    recipe, rank = plan.recipe, dist.get_rank()
    assert plan.data.cache
    rows = Rows(Path(plan.data.cache), "train")
    engine = TorchEngine(plan, rows.card, device)
    reader = StepReader(plan, rows, rank, pin=device.type == "cuda")
    state = _restore(engine, plan, run_folder / "checkpoints")
    saver = Saver(run_folder / "checkpoints", rank, plan.batch.gpus, attempt, recipe.checkpoint)
    evaluator = Evaluator(plan, engine)
    gauge = MemoryGauge(device)
    metrics = MetricsFile(run_folder / "metrics.jsonl", state.step) if rank == 0 else None
    clock = plan.clock()
    saved_at, saved_when = state.step, time.monotonic()
    loss, evaluation, reason = None, None, ""
    non_finite_run = 0

    engine.warm_up(reader.widest().tensors)
    started = time.perf_counter()
    for step in read_ahead(reader, state.step + 1, plan.steps.total):
        minutes = recipe.checkpoint.every_minutes
        save_due = minutes is not None and time.monotonic() - saved_when >= 60 * minutes
        total = _forward_backward(engine, step)
        agreement = Agreement(total / step.weight, stop_asked(), save_due and rank == 0)
        norm = engine.clip(recipe.optimizer.max_grad_norm)
        verdict = agreement.reach(norm)
        rate = schedule.rate(plan.schedule, step.number, clock)
        if verdict.finite:
            engine.step(rate)
            non_finite_run = 0
        else:
            state.skipped_steps.append(step.number)
            non_finite_run += 1
        engine.zero_grad()
        if engine.scaler:
            engine.scaler.update(verdict.finite)
        state.step, state.samples = step.number, clock.consumed(step.number)
        state.tokens += step.tokens
        state.metric = None
        loss = verdict.loss

        seconds = time.perf_counter() - started

        last = step.number == plan.steps.total
        evaluated = evaluator.is_due(step.number) or (last and evaluator.enabled)
        if evaluated:
            evaluation = evaluator.run()
            reason = _judge(state, evaluation, plan)
        if metrics:
            metrics.add(**_line(step, state, verdict, rate, seconds, gauge, plan))
            if evaluated and evaluation:
                metrics.add(step=step.number, **evaluation)
            if last or evaluated or step.number % recipe.logging.every_steps == 0:
                metrics.flush()
        started = time.perf_counter()

        ending = last or verdict.stop or bool(reason)
        if ending or verdict.save_due or _save_is_due(plan, state, evaluated):
            if metrics:
                metrics.flush()
            _save(engine, saver, state)
            saved_at, saved_when = step.number, time.monotonic()
        if non_finite_run >= LONGEST_NON_FINITE_RUN:
            raise RunError(
                f"step {step.number}: loss or gradient not finite {non_finite_run} steps in a row"
            )
        if ending:
            break

    saver.wait()
    if metrics:
        metrics.close()
    assert saved_at == state.step
    early = state.step < plan.steps.total
    outcome = "stopped" if early and not reason else "finished"
    return Outcome(outcome, state.step, loss, evaluation, reason)


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


def _line(
    step: Step,
    state: TrainState,
    verdict: Verdict,
    rate: float,
    seconds: float,
    gauge: MemoryGauge,
    plan: Plan,
) -> dict[str, object]:
    """One line of metrics.jsonl (DESIGN §12)."""
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": verdict.loss,
        "lr": rate,
        "grad_norm": verdict.grad_norm,
        "samples": state.samples,
        "weight": step.weight,
        "digest": step.digest,
        "seconds": seconds,
        "samples_per_s": step.samples / seconds,
        "tokens_per_s": step.tokens / seconds,
        "mfu": gauge.mfu(plan, seconds),
        **gauge.read(),
        "skipped": not verdict.finite,
    }


def _save_is_due(plan: Plan, state: TrainState, evaluated: bool) -> bool:
    """By the step count, or because this evaluation is the best so far."""
    spec = plan.recipe.checkpoint
    by_count = spec.every_steps is not None and state.step % spec.every_steps == 0
    milestone = spec.keep_every is not None and state.step % spec.keep_every == 0
    is_best = evaluated and spec.keep_best > 0 and state.evaluations_without_gain == 0
    return by_count or milestone or is_best


def _save(engine: TorchEngine, saver: Saver, state: TrainState) -> None:
    if engine.scaler:
        state.loss_scale = vars(engine.scaler).copy()
    saver.save(engine.pieces(), state)


def _judge(state: TrainState, evaluation: dict[str, float], plan: Plan) -> str:
    """Update the best metric; why to stop early, or nothing."""
    rule = plan.recipe.early_stopping
    metric, mode, least = (
        (rule.metric, rule.mode, rule.min_delta) if rule else ("eval/loss", "min", 0.0)
    )
    value = evaluation[metric]
    state.metric, state.metric_mode = value, mode
    gain = math.inf
    if state.best_metric is not None:
        gain = state.best_metric - value if mode == "min" else value - state.best_metric
    if gain > least:
        state.best_metric, state.evaluations_without_gain = value, 0
    else:
        state.evaluations_without_gain += 1
    if rule and state.evaluations_without_gain >= rule.patience:
        return (
            f"early stopping: {metric} has not improved on {state.best_metric:.6g} by more than "
            f"{rule.min_delta:g} for {rule.patience} evaluations"
        )
    return ""


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
