"""metrics.jsonl: a line for every step, buffered; each step stands there once."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from toolkit.plan.model import Plan
from toolkit.train.agreement import Verdict
from toolkit.train.batches import Step
from toolkit.train.checkpoint import TrainState
from toolkit.train.memory import MemoryGauge


class Logbook:
    """What the loop has to tell of each step; only rank 0 writes."""

    def __init__(self, plan: Plan, path: Path, device: torch.device, resume_at: int) -> None:
        self._plan, self._gauge = plan, MemoryGauge(device)
        self._file = MetricsFile(path, resume_at) if dist.get_rank() == 0 else None
        self._started = 0.0

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps as they come; a step's time runs from asking for its data to `record`."""
        while True:
            self._started = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            yield step

    def record(self, step: Step, state: TrainState, verdict: Verdict, rate: float) -> None:
        """One line of metrics.jsonl."""
        if self._file is None:
            return
        seconds = time.perf_counter() - self._started
        self._file.add(
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
            skipped=not verdict.finite,
        )
        if step.number % self._plan.recipe.logging.every_steps == 0:
            self.flush()

    def record_evaluation(self, step: int, evaluation: dict[str, float]) -> None:
        """A line of its own, shown at once."""
        if self._file:
            self._file.add(step=step, **evaluation)
            self.flush()

    def flush(self) -> None:
        """Write the lines held so far."""
        if self._file:
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()


class MetricsFile:
    """Lines are held until `flush`, which comes when the loop logs or saves."""

    def __init__(self, path: Path, resume_at: int) -> None:
        self._path = path
        self._waiting: list[str] = []
        if path.exists():
            _keep_until(path, resume_at)
        self._file = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """One line; numbers that are not finite become null."""
        self._waiting.append(json.dumps({name: _finite(value) for name, value in values.items()}))

    def flush(self) -> None:
        """Write the lines held so far."""
        if self._waiting:
            self._file.write("\n".join(self._waiting) + "\n")
            self._file.flush()
            self._waiting.clear()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a torn last one is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    result = []
    for line in lines:
        try:
            result.append(json.loads(line))
        except ValueError:
            continue
    return result


def _keep_until(path: Path, step: int) -> None:
    """Drop lines after the checkpoint that the run resumes from, and a torn last line."""
    kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
