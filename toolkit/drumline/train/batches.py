"""Builds a rank's micro-batches, read ahead in a thread.

`StepReader` computes any step from the plan alone, so a resumed run reads step t without reading the steps
before it.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drumline.data.rows import Rows
from drumline.data.tasks import IGNORED, Arrays, find_task
from drumline.plan import order, steps
from drumline.plan.model import Plan

READ_AHEAD_STEPS = 2


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
    return Rows(Path(plan.data.cache), part, find_task(data, plan.recipe.project))


class StepReader:
    """Builds the steps of one rank from the prepared rows."""

    def __init__(self, plan: Plan, rows: Rows, rank: int, pin: bool = False) -> None:
        self._plan, self._rows, self._pin = plan, rows, pin
        self._data_ranks, self._data_rank = plan.mesh.data_ranks, plan.mesh.data_rank(rank)
        self._clock = plan.clock()
        self._by_sample = plan.recipe.batch.weighting == "sample"
        # An objective of the project's own does not tell the loss of a row.
        mixture = () if plan.recipe.objective.factory else plan.data.mixture
        self._ends = np.cumsum([own.rows or 0 for own in mixture], dtype=np.int64)

    def step_indices(self, number: int) -> NDArray[np.int64]:
        """Sample indices of a step in slot order, int64 [samples]; the same on every rank."""
        first, end = self._clock.slots(number)
        return self._plan.samples_at(first, end)

    def read(self, number: int) -> Step:
        """Build one step with this rank's micro-batches."""
        indices = self.step_indices(number)
        counts = self._rows.counts[indices]
        per_device = self._plan.batch.per_device_at(number)
        first_slot, end_slot = self._clock.slots(number)
        seeds = order.draw_seeds(self._plan.recipe.seed, np.arange(first_slot, end_slot))
        micro_batches = [
            self._micro_batch(indices, seeds, start, stop, first_slot)
            for start, stop in steps.share(
                len(indices), per_device, self._data_ranks, self._data_rank
            )
        ]
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
            first_weight=self._weight(indices[: per_device * self._data_ranks]),
            source_weights=self._source_weights(indices),
        )

    def _source_weights(self, indices: NDArray[np.int64]) -> tuple[float, ...]:
        """The part of W of each source of a mixture."""
        owners = self._owners(indices)
        return tuple(self._weight(indices[owners == source]) for source in range(len(self._ends)))

    def _owners(self, indices: NDArray[np.int64]) -> NDArray[np.intp]:
        """The source of each row."""
        return np.searchsorted(self._ends, indices, side="right")

    def _weight(self, indices: NDArray[np.int64]) -> float:
        """Number of samples or of label tokens, by `batch.weighting`."""
        return float(len(indices) if self._by_sample else self._rows.counts[indices].sum())

    def widest(self) -> MicroBatch:
        """A dummy micro-batch of the largest shape of the run, for warm-up passes."""
        count = min(self._plan.batch.per_device, len(self._rows))
        rows = self._rows
        manifest = rows.manifest.with_rows_of(self._plan.data.row_tokens)
        first = np.zeros(count, dtype=np.int64)
        seeds = np.zeros(count, dtype=np.uint64)
        arrays = rows.task.widen(rows.collate(first, seeds), manifest)
        nothing = np.zeros(0, dtype=np.int64)
        return MicroBatch(
            tensors=as_tensors(arrays, np.zeros(count), dummy=True)
            | self._sources(first)
            | self._lengths(first),
            first_slot=0,
            is_dummy=True,
            indices=nothing,
        )

    def _micro_batch(
        self,
        indices: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        start: int,
        stop: int,
        first_slot: int,
    ) -> MicroBatch:
        dummy = start == stop
        which = slice(0, 1) if dummy else slice(start, stop)
        chosen = indices[which]
        tensors = micro_batch_tensors(self._rows, chosen, self._by_sample, dummy, seeds[which])
        tensors |= self._sources(chosen) | self._lengths(chosen)
        if self._pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        own = indices[start:stop]
        return MicroBatch(
            tensors=tensors,
            first_slot=first_slot + start,
            is_dummy=dummy,
            indices=own,
            weight=self._weight(own),
        )

    def _sources(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """`sources`, float32 [n, s]: 1 in the column of a row's source; nothing where there is no mixture."""
        if not len(self._ends):
            return {}
        own = self._owners(chosen)[:, None] == np.arange(len(self._ends))
        return {"sources": torch.from_numpy(own.astype(np.float32))}

    def _lengths(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """`lengths`, int64 [n]: input tokens of each row; nothing where there is no noise on embeddings."""
        if self._plan.recipe.model.neftune_alpha is None:
            return {}
        is_next_a_target = self._plan.recipe.data.facts.is_shifted
        found = self._rows.column("lengths")[chosen] - int(is_next_a_target)
        return {"lengths": torch.from_numpy(found.astype(np.int64))}


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
    if "attention_mask" in arrays and arrays["attention_mask"].all():
        del arrays[
            "attention_mask"
        ]  # it masks nothing, and testing that on a GPU would synchronise
    return as_tensors(arrays, weights, dummy)


def as_tensors(arrays: Arrays, weights: NDArray[np.float64], dummy: bool) -> dict[str, Tensor]:
    """Arrays as host tensors, with `weights`; for a dummy all targets are -100, or NaN if they are floats."""
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    tensors["weights"] = torch.from_numpy(weights.astype(np.float32))
    if dummy:
        is_float = tensors["targets"].is_floating_point()
        tensors["targets"].fill_(float("nan") if is_float else IGNORED)
    return tensors


def read_ahead(reader: StepReader, first: int, last: int) -> Iterator[Step]:
    """Yield steps first..last in order, prepared in a thread while the device works."""
    waiting: queue.Queue[Step | BaseException] = queue.Queue(maxsize=READ_AHEAD_STEPS)
    stopped = threading.Event()

    def put(item: Step | BaseException) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in range(first, last + 1):
                put(reader.read(number))
                if stopped.is_set():
                    return
        except BaseException as error:  # passed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first, last + 1):
            item = waiting.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
