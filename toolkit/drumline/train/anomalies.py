"""Decides what to do with a step whose loss or gradient is not finite, or whose loss spikes.

Every rank judges the same all-reduced numbers, so either all ranks skip the update or none.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from drumline.checkpoint.state import TrainState
from drumline.errors import NotFinite, NotFiniteAfterLoad
from drumline.recipe.schema import Anomalies
from drumline.train.batches import Step
from drumline.train.scaler import LossScaler
from drumline.train.step_reduce import Verdict

SUSPECT_STEPS = 3
"""After this many non-finite steps right after a load, the checkpoint is taken to be bad."""

MOST_INDICES = 1024
"""Most sample indices listed for one step; its digest identifies the samples in any case."""


@dataclass(frozen=True)
class Judgement:
    """Whether the update is skipped; `why` names the anomaly, or is empty."""

    skip: bool = False
    why: str = ""
    sigma: float | None = None


class Judge:
    """Judges every step; its history is kept in the train state and so in the checkpoints.

    `suspect`: the checkpoint that was loaded, if there is an older one to fall back to.
    """

    def __init__(self, spec: Anomalies, state: TrainState, suspect: str | None) -> None:
        self._spec, self._state, self._suspect = spec, state, suspect
        self._first, self._skipped_before = state.step + 1, state.skipped_in_a_row
        self._not_finite = 0

    def judge(self, step: int, verdict: Verdict, scaler: LossScaler | None) -> Judgement:
        """Skip a step that is not finite, check a finite one for a spike; records skips in the state."""
        found = self._look(verdict, scaler)
        if scaler and (found.why == "overflow" or not found.skip):
            scaler.update(overflow=found.why == "overflow")
        if found.why == "overflow":
            return found
        state = self._state
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if found.skip else 0
        if found.why.endswith("not finite"):
            self._not_finite += 1
        if found.skip:
            state.skipped_steps.append(step)
        else:
            window = self._spec.spike_window
            state.recent_losses = [*state.recent_losses, verdict.loss][-window:]
        return found

    def raise_if_hopeless(self, step: int) -> None:
        """End the attempt after too many skipped steps.

        NotFiniteAfterLoad when the first steps after a load were all not finite; NotFinite when
        `max_skipped` steps in a row were skipped.
        """
        in_a_row = self._state.skipped_in_a_row
        suspect_after = min(SUSPECT_STEPS, self._spec.max_skipped)
        since_load = step - self._first + 1
        all_since_load = self._not_finite == since_load == suspect_after
        if self._suspect and not self._skipped_before and all_since_load:
            raise NotFiniteAfterLoad(
                f"step {step}: not finite in all {since_load} steps since {self._suspect} was loaded",
                self._suspect,
            )
        if in_a_row >= self._spec.max_skipped:
            raise NotFinite(
                f"step {step}: {in_a_row} steps in a row were skipped (anomalies.max_skipped "
                f"{self._spec.max_skipped}); metrics.jsonl names their samples. Nearest: a smaller "
                "optimizer.lr, or data without these samples"
            )

    def _look(self, verdict: Verdict, scaler: LossScaler | None) -> Judgement:
        if not verdict.loss_is_finite:
            return Judgement(skip=True, why="loss not finite")
        if not verdict.finite:
            if scaler and scaler.scale > 1.0:
                return Judgement(skip=True, why="overflow")
            return Judgement(skip=True, why="gradient not finite")
        sigma = self._sigma(verdict.loss)
        if sigma is not None and self._spec.spike_sigma and sigma > self._spec.spike_sigma:
            return Judgement(skip=self._spec.skip_spikes, why="spike", sigma=sigma)
        return Judgement(sigma=sigma)

    def _sigma(self, loss: float) -> float | None:
        """Standard deviations above the mean of the last `spike_window` losses; None with fewer losses."""
        recent = self._state.recent_losses
        if self._spec.spike_sigma is None or len(recent) < self._spec.spike_window:
            return None
        mean = math.fsum(recent) / len(recent)  # statistics.stdev takes a fifth of a millisecond
        spread = math.sqrt(math.fsum((one - mean) ** 2 for one in recent) / (len(recent) - 1))
        return (loss - mean) / spread if spread else None


def find_culprits(step: Step, losses: list[float]) -> dict[str, Any]:
    """The ranks and samples of the micro-batches whose loss is not finite.

    A collective: every rank calls it for an anomalous step. If every micro-batch's loss is finite, `ranks` is
    empty and `indices` are those of the whole step. More than `MOST_INDICES` indices give None.
    """
    mine = [
        int(index)
        for micro_batch, loss in zip(step.micro_batches, losses, strict=True)
        if not abs(loss) < float("inf")
        for index in micro_batch.indices
    ]
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    ranks = [rank for rank, theirs in enumerate(everyone) if theirs]
    indices = [index for theirs in everyone for index in theirs] or step.indices.tolist()
    return {"ranks": ranks, "indices": indices if len(indices) <= MOST_INDICES else None}
