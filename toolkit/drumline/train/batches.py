"""Builds a rank's micro-batches.

`StepReader` computes any step from the plan alone, so a resumed run reads step t without reading the steps
before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drumline.data.rows import Rows
from drumline.data.tasks import IGNORED, Arrays, find_task
from drumline.data.tasks.base import WEIGHTS, refuse_own_weights
from drumline.data.validation_split import TRAIN
from drumline.plan import order, steps
from drumline.plan.model import Plan, read_plan
from drumline.recipe.schema import factories_of


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward on one rank: host tensors, and the first slot, which seeds dropout.

    `indices`: its samples; `weight`: its part of W. A rank without a sample gets a dummy micro-batch: a row
    of the same step with all targets ignored.
    """

    tensors: dict[str, Tensor]
    first_slot: int
    is_dummy: bool
    indices: NDArray[np.int64]
    weight: float = 0.0


@dataclass(frozen=True)
class Step:
    """All that a rank needs for one optimizer step; `weight` is W of the whole effective batch.

    `seeds`: of what is drawn for each sample. `first_weight`: the part of W in the first micro-batches of all
    ranks. `source_weights`: the parts of a mixture's sources.
    """

    number: int
    epoch: int
    samples: int
    tokens: int
    weight: float
    digest: str
    indices: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    micro_batches: list[MicroBatch]
    first_weight: float = 0.0
    source_weights: tuple[float, ...] = ()


def open_rows(plan: Plan, part: str) -> Rows:
    """The plan's prepared rows of `train` or `validation`."""
    assert plan.data.cache
    data = plan.recipe.data
    reads_masks = data.source == "dataset" or data.task_factory or plan.recipe.objective.factory
    task = find_task(data, plan.recipe.project)
    return Rows(Path(plan.data.cache), part, task, keeps_masks=bool(reads_masks))


class Request(NamedTuple):
    """The samples of a micro-batch: rows, seeds of what is drawn for them, and whether none counts."""

    indices: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    is_dummy: bool


class MicroBatches:
    """Host tensors of micro-batches of a part of the prepared rows, by `Request`.

    A copy in another process opens the rows anew.
    """

    def __init__(self, plan: Plan, rows: Rows) -> None:
        self._plan, self.rows = plan, rows
        self._by_sample = plan.recipe.batch.weighting == "sample"
        # An objective of the project's own does not tell the loss of a row.
        has_sources = rows.part == TRAIN and not plan.recipe.objective.factory
        mixture = plan.data.mixture if has_sources else ()
        self.ends = np.cumsum([own.rows or 0 for own in mixture], dtype=np.int64)

    @property
    def imports(self) -> list[str]:
        """What a project's code imports before the first micro-batch, which takes a process seconds."""
        return ["drumline.train.objectives"] if factories_of(self._plan.recipe) else []

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self._plan.to_json(), "part": self.rows.part, "added": self.rows.added}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plan = read_plan(state["plan"])
        rows = open_rows(plan, state["part"])
        for name, values in state["added"].items():
            rows.attach(name, values)
        self.__init__(plan, rows)  # type: ignore[misc]

    def __getitem__(self, request: Request) -> dict[str, Tensor]:
        chosen, seeds, is_dummy = request
        beside = self.rows.task.companion(self.rows, chosen)
        if beside is not None:
            chosen, seeds = np.append(chosen, beside), np.append(seeds, np.uint64(0))
        tensors = micro_batch_tensors(self.rows, chosen, self._by_sample, is_dummy, seeds)
        if beside is not None:
            tensors["targets"][-1] = IGNORED
        return tensors | self.sources(chosen) | self.lengths(chosen)

    def owners(self, indices: NDArray[np.int64]) -> NDArray[np.intp]:
        """The source of each row, of a mixture."""
        return np.searchsorted(self.ends, indices, side="right")

    def sources(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """`sources`, float32 [n, s]: 1 in the column of a row's source; nothing where there is no mixture."""
        if not len(self.ends):
            return {}
        own = self.owners(chosen)[:, None] == np.arange(len(self.ends))
        return {"sources": torch.from_numpy(own.astype(np.float32))}

    def lengths(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """`lengths`, int64 [n]: input tokens of each row; nothing where there is no noise on embeddings."""
        if self._plan.recipe.model.neftune_alpha is None or self.rows.part != TRAIN:
            return {}
        found = self.rows.column("lengths")[chosen] - int(self._plan.recipe.data.facts.is_shifted)
        return {"lengths": torch.from_numpy(found.astype(np.int64))}


class _Samples(NamedTuple):
    """The samples at the slots first..end (exclusive) of the order, and their seeds."""

    first: int
    end: int
    indices: NDArray[np.int64]
    seeds: NDArray[np.uint64]


_SLOTS_AT_ONCE = 1024


class StepReader:
    """Builds the steps of one rank from the prepared rows."""

    def __init__(self, plan: Plan, rows: Rows, rank: int, pin: bool = False) -> None:
        self._plan, self._rows, self.pin = plan, rows, pin
        self._data_ranks, self._data_rank = plan.mesh.data_ranks, plan.mesh.data_rank(rank)
        self._clock = plan.clock()
        self._by_sample = plan.recipe.batch.weighting == "sample"
        self.micro_batches = MicroBatches(plan, rows)
        self._known = _Samples(0, 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64))

    def step_indices(self, number: int) -> NDArray[np.int64]:
        """Sample indices of a step in slot order, int64 [samples]; the same on every rank."""
        return self._samples(number)[0]

    def _samples(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Sample indices of a step, and the seeds of what is drawn for each.

        Computed for some steps at once, because for a few samples numpy's calls take longer than their work.
        """
        first, end = self._clock.slots(number)
        known = self._known
        if not known.first <= first <= end <= known.end:
            last = min(self._plan.steps.total, number + _SLOTS_AT_ONCE // max(1, end - first))
            until = max(end, self._clock.slots(last)[1])
            seeds = order.draw_seeds(self._plan.recipe.seed, np.arange(first, until))
            known = _Samples(first, until, self._plan.samples_at(first, until), seeds)
            self._known = known
        own = slice(first - known.first, end - known.first)
        return known.indices[own], known.seeds[own]

    def requests(self, number: int) -> list[Request]:
        """This rank's micro-batches of a step; a dummy is a row of the same step."""
        indices, seeds = self._samples(number)
        return [
            Request(indices[which], seeds[which], start == stop)
            for start, stop in self._places(number)
            for which in [slice(0, 1) if start == stop else slice(start, stop)]
        ]

    def read(self, number: int, tensors: Iterator[dict[str, Tensor]] | None = None) -> Step:
        """Build one step with this rank's micro-batches.

        `tensors`: where they come from, in order, if they are read (and pinned) elsewhere.
        """
        indices, seeds = self._samples(number)
        counts = self._rows.counts[indices]
        first_slot = self._clock.slots(number)[0]
        if tensors is None:
            tensors = map(self._read_here, self.requests(number))
        micro_batches = [
            MicroBatch(
                tensors=next(tensors),
                first_slot=first_slot + start,
                is_dummy=start == stop,
                indices=indices[start:stop],
                weight=self._weight(indices[start:stop]),
            )
            for start, stop in self._places(number)
        ]
        row = self._plan.batch.per_device_at(number) * self._data_ranks
        return Step(
            number=number,
            epoch=self._clock.epoch(number),
            samples=len(indices),
            tokens=int(counts.sum()),
            weight=self._weight(indices),
            digest=order.digest(indices),
            indices=indices,
            seeds=seeds,
            micro_batches=micro_batches,
            first_weight=self._weight(indices[:row]),
            source_weights=self._source_weights(indices),
        )

    def widest(self) -> MicroBatch:
        """A dummy micro-batch of the largest shape of the run, for warm-up passes."""
        count = min(self._plan.batch.per_device, len(self._rows))
        rows = self._rows
        manifest = rows.manifest.with_rows_of(self._plan.data.row_tokens)
        first = rows.task.largest(rows, count)
        count = len(first)
        seeds = np.zeros(count, dtype=np.uint64)
        arrays = rows.task.widen(rows.collate(first, seeds), manifest)
        nothing = np.zeros(0, dtype=np.int64)
        return MicroBatch(
            tensors=as_tensors(arrays, np.zeros(count), dummy=True)
            | self.micro_batches.sources(first)
            | self.micro_batches.lengths(first),
            first_slot=0,
            is_dummy=True,
            indices=nothing,
        )

    def _places(self, number: int) -> list[tuple[int, int]]:
        """First and end of this rank's micro-batches in the step, equal for a dummy."""
        first, end = self._clock.slots(number)
        per_device = self._plan.batch.per_device_at(number)
        return steps.share(end - first, per_device, self._data_ranks, self._data_rank)

    def _source_weights(self, indices: NDArray[np.int64]) -> tuple[float, ...]:
        """The part of W of each source of a mixture."""
        owners = self.micro_batches.owners(indices)
        count = len(self.micro_batches.ends)
        return tuple(self._weight(indices[owners == source]) for source in range(count))

    def _weight(self, indices: NDArray[np.int64]) -> float:
        """Number of samples or of label tokens, by `batch.weighting`."""
        return float(len(indices) if self._by_sample else self._rows.counts[indices].sum())

    def _read_here(self, request: Request) -> dict[str, Tensor]:
        tensors = self.micro_batches[request]
        if not self.pin:
            return tensors
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}


def micro_batch_tensors(
    rows: Rows,
    indices: NDArray[np.int64],
    by_sample: bool,
    dummy: bool,
    seeds: NDArray[np.uint64] | None = None,
) -> dict[str, Tensor]:
    """Rows as host tensors, with `weights` float32 [n]: the weight of each counted token of a row.

    `seeds`: of what is drawn for each of them.
    """
    weights = 1.0 / rows.counts[indices] if by_sample else np.ones(len(indices))
    arrays = rows.collate(indices, seeds)
    refuse_own_weights(arrays)
    is_there = "attention_mask" in arrays and not rows.keeps_masks
    if is_there and arrays["attention_mask"].all():
        del arrays[
            "attention_mask"
        ]  # it masks nothing, and testing that on a GPU would synchronise
    return as_tensors(arrays, weights, dummy)


def as_tensors(arrays: Arrays, weights: NDArray[np.float64], dummy: bool) -> dict[str, Tensor]:
    """Arrays as host tensors, with `weights`; for a dummy all targets are -100, or NaN if they are floats.

    A dummy without targets, which only samples of the project have, has weights of zero.
    """
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    tensors[WEIGHTS] = torch.from_numpy(weights.astype(np.float32))
    if dummy and "targets" not in tensors:
        tensors[WEIGHTS].zero_()
    elif dummy:
        is_float = tensors["targets"].is_floating_point()
        tensors["targets"].fill_(float("nan") if is_float else IGNORED)
    return tensors
