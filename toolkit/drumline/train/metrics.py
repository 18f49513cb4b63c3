"""Writes the records of steps, evaluations and events to metrics.jsonl."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from drumline.after_files import AfterFiles, metrics_of
from drumline.checkpoint.state import TrainState
from drumline.metrics_file import Kind, MetricsFile
from drumline.plan.model import Plan
from drumline.plan.noise import noise_scale
from drumline.train.anomalies import Judgement
from drumline.train.batches import Step
from drumline.train.device_memory import MemoryGauge
from drumline.train.step_reduce import Verdict


class Logbook:
    """Collects the loop's records on every rank; only rank 0 writes them.

    `metrics`: names of those that steps report beside the loss.
    """

    def __init__(
        self,
        plan: Plan,
        path: Path,
        device: torch.device,
        state: TrainState,
        metrics: tuple[str, ...] = (),
    ) -> None:
        self._plan, self._gauge, self._metrics = plan, MemoryGauge(device), metrics
        self._file, self._reached = None, state.step
        if dist.get_rank() == 0:
            self._file = MetricsFile(path, state.step, state.evaluation_due)
            self._after = AfterFiles(path.parent)
            self._after.forget_after(state.step)
        self._started = 0.0

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps and time each from the request for its data to `record`."""
        while True:
            self._started = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            yield step

    def record(
        self,
        step: Step,
        state: TrainState,
        verdict: Verdict,
        rate: float,
        judgement: Judgement,
        culprits: dict[str, Any],
        spent: dict[str, float],
    ) -> None:
        """Add a step's line; for an anomalous step it includes the reason, ranks and samples.

        `spent`: seconds by phase since the line before.
        """
        if self._file is None:
            return
        seconds = time.perf_counter() - self._started
        self._reached = step.number
        self._file.add(
            Kind.STEP,
            step=step.number,
            epoch=step.epoch,
            loss=verdict.loss,
            lr=rate,
            grad_norm=verdict.grad_norm,
            samples=state.samples,
            weight=step.weight,
            digest=step.digest,
            seconds=seconds,
            samples_per_s=step.samples / seconds,
            tokens_per_s=step.tokens / seconds,
            mfu=self._gauge.mfu(self._plan, seconds),
            **self._gauge.read(),
            skipped=judgement.skip,
            **spent,
            **({"why": judgement.why, "sigma": judgement.sigma} if judgement.why else {}),
            **culprits,
            **self._beside_loss(step, verdict),
            **_noise_values(state),
        )
        if step.number % self._plan.recipe.logging.every_steps == 0:
            self.flush()

    def _beside_loss(self, step: Step, verdict: Verdict) -> dict[str, float | None]:
        """The step's metrics, and `loss/<source>` of each source of a mixture.

        Null where the step has no sample of it.
        """
        count = len(self._metrics)
        ours, others = verdict.beside_loss[: 2 * count], verdict.beside_loss[2 * count :]
        metrics = zip(self._metrics, ours[::2], ours[1::2], strict=True)
        sources = zip(
            (f"loss/{own.label}" for own in self._plan.data.mixture),
            others,
            step.source_weights,
            strict=False,
        )
        return {
            name: total / weight if weight else None for name, total, weight in (*metrics, *sources)
        }

    def record_evaluation(self, step: int, evaluation: dict[str, float]) -> None:
        """Add an evaluation's line and flush it."""
        if self._file:
            self._file.add(Kind.EVALUATION, step=step, **evaluation)
            self.flush()

    def record_save(self, step: int) -> None:
        """Record that a checkpoint was published, with the time in seconds since 1970."""
        self.record_event(step, **{"checkpoint/saved": round(time.time(), 3)})

    def record_event(self, step: int, **values: str | float) -> None:
        """Add a line for an event outside the steps, such as a successful or failed save, and flush it."""
        if self._file:
            self._file.add(Kind.EVENT, step=step, **values)
            self.flush()

    def flush(self) -> None:
        """Write the buffered lines; those that cannot be written now stay buffered."""
        if self._file:
            told = self._add_results(self._file) if self._plan.recipe.after else []
            self._file.flush()
            for step, name in told:
                self._after.told(step, name)

    def _add_results(self, file: MetricsFile) -> list[tuple[int, str]]:
        """Add the numbers of commands that have ended since; returns their steps and names."""
        results = self._after.untold(self._reached)
        for step, name, result in results:
            file.add(Kind.EVENT, step=step, **metrics_of(name, result))
        return [(step, name) for step, name, _ in results]

    def sync(self) -> None:
        """Write every line to disk, before a checkpoint is published; OSError on failure."""
        if self._file:
            self._file.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()


def _noise_values(state: TrainState) -> dict[str, float]:
    """B_simple in samples with its 90 % interval; empty until enough steps were measured."""
    found = noise_scale(state.noise)
    if found is None:
        return {}
    return {
        "noise_scale": found.value,
        "noise_scale_low": found.low,
        "noise_scale_high": found.high,
    }
