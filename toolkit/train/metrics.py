"""metrics.jsonl: a line for every step, buffered; each step stands there once."""

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from toolkit.checkpoint.state import TrainState
from toolkit.files import write_text
from toolkit.plan.model import Plan
from toolkit.train.agreement import Verdict
from toolkit.train.anomalies import Judgement
from toolkit.train.batches import Step
from toolkit.train.memory import MemoryGauge


class Logbook:
    """What the loop has to tell of each step; only rank 0 writes."""

    def __init__(self, plan: Plan, path: Path, device: torch.device, state: TrainState) -> None:
        self._plan, self._gauge = plan, MemoryGauge(device)
        self._file = None
        if dist.get_rank() == 0:
            self._file = MetricsFile(path, state.step, state.evaluation_due)
        self._started = 0.0

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps as they come; a step's time runs from asking for its data to `record`."""
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
    ) -> None:
        """One line of metrics.jsonl; an odd step's also says why, on which ranks, of which samples."""
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
            skipped=judgement.skip,
            **({"why": judgement.why, "sigma": judgement.sigma} if judgement.why else {}),
            **culprits,
        )
        if step.number % self._plan.recipe.logging.every_steps == 0:
            self.flush()

    def record_evaluation(self, step: int, evaluation: dict[str, float]) -> None:
        """A line of its own, shown at once."""
        if self._file:
            self._file.add(step=step, **evaluation)
            self.flush()

    def record_event(self, step: int, **values: str) -> None:
        """Something that happened beside the steps, such as a save that failed."""
        if self._file:
            self._file.add(step=step, **values)
            self.flush()

    def flush(self) -> None:
        """Write the lines held so far; what cannot be written now is held on."""
        if self._file:
            self._file.flush()

    def sync(self) -> None:
        """Put every line on disk, before a checkpoint that counts on them; OSError where it fails."""
        if self._file:
            self._file.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()


class MetricsFile:
    """Lines are held until `flush`, which comes when the loop logs or saves.

    A line that the disk refuses is held on and written later; none stands there in part.
    """

    def __init__(self, path: Path, resume_at: int, evaluation_due: bool = False) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._told = False
        if path.exists():
            _keep_until(path, resume_at, evaluation_due)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._descriptor).st_size

    def add(self, **values: Any) -> None:
        """One line; numbers that are not finite become null."""
        line = json.dumps({name: _finite(value) for name, value in values.items()})
        with self._lock:
            self._waiting.append(line)

    def flush(self) -> None:
        """Write the lines held so far; an error is told once and the lines are held on."""
        try:
            self._write()
        except OSError as error:
            if not self._told:
                print(f"{self._path}: {error.strerror}; its lines are held", flush=True)
            self._told = True

    def sync(self) -> None:
        """Write the lines held so far and wait for the disk; OSError where it refuses."""
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._descriptor)

    def _write(self) -> None:
        with self._lock:
            raw = "".join(f"{line}\n" for line in self._waiting).encode()
            try:
                if os.write(self._descriptor, raw) < len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(raw)
            self._waiting.clear()


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


def _keep_until(path: Path, step: int, evaluation_due: bool) -> None:
    """Drop lines after the checkpoint that the run resumes from, and a torn last line.

    Also an evaluation of that very step, where it is to be done again.
    """

    def is_kept(line: dict[str, Any]) -> bool:
        again = evaluation_due and line["step"] == step and "eval/loss" in line
        return bool(line["step"] <= step and not again)

    kept = [json.dumps(line) for line in read_metrics(path) if is_kept(line)]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
