"""What to do with a step whose loss or gradient is not finite, or whose loss leaps.

Every rank judges the same agreed numbers, so all skip or none.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from toolkit.checkpoint.state import TrainState
from toolkit.errors import NotFinite, NotFiniteAfterLoad
from toolkit.recipe.schema import Anomalies
from toolkit.train.agreement import Verdict
from toolkit.train.batches import Step
from toolkit.train.scaler import LossScaler

SUSPECT_STEPS = 3
"""As many non-finite steps right after a load speak against the checkpoint."""

MOST_INDICES = 1024
"""A step's samples are listed up to this many; the digest names them in any case."""


@dataclass(frozen=True)
class Judgement:
    """Whether the update is applied; `why` is empty, or names what was odd about the step."""

    skip: bool = False
    why: str = ""
    sigma: float | None = None


class Judge:
    """Judges step after step; what it remembers lies in the state and so in the checkpoints.

    `suspect` is the checkpoint that was loaded, where there is another one to fall back to.
    """

    def __init__(self, spec: Anomalies, state: TrainState, suspect: str | None) -> None:
        self._spec, self._state, self._suspect = spec, state, suspect
        self._first, self._skipped_before = state.step + 1, state.skipped_in_a_row
        self._not_finite = 0

    def judge(self, step: int, verdict: Verdict, scaler: LossScaler | None) -> Judgement:
        """Skip what is not finite, measure what is; counts in the state what was skipped."""
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
        """End the attempt when too many steps in a row were skipped, or the first after a load."""
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
        """How many standard deviations above the last n losses; None until there are n."""
        recent = self._state.recent_losses
        if self._spec.spike_sigma is None or len(recent) < self._spec.spike_window:
            return None
        spread = statistics.stdev(recent)
        return (loss - statistics.fmean(recent)) / spread if spread else None


def find_culprits(step: Step, losses: list[float]) -> dict[str, Any]:
    """Which ranks' micro-batches had a loss that is not finite, and of which samples.

    Every rank calls it, after all have agreed that the step is odd. Where no single micro-batch is
    to blame, `ranks` is empty and `indices` are the whole step's.
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
