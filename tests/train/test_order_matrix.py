"""The order matrix: every split reads the same samples, and a resume goes on with them.

The real StepReader reads stub rows whose features are their own indices, so that what each rank
would feed to the model can be put together again and compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conftest import tiny_recipe
from drumline.data.tasks import Task
from drumline.plan import order
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.load import validate
from drumline.train.batches import StepReader

EFFECTIVE, EPOCHS = 12, 3
SPLITS = [
    (b, w, 12 // (b * w)) for w in (1, 2, 3, 4) for b in (1, 2, 3, 4, 6, 12) if 12 % (b * w) == 0
]


class IndexRows:
    """Rows whose features are their own numbers."""

    part = "train"
    task = Task()

    def __init__(self, n: int) -> None:
        self.counts = np.ones(n, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.counts)

    def collate(self, indices: np.ndarray, seeds: np.ndarray) -> dict[str, Any]:
        return {"features": indices.copy(), "targets": np.zeros(len(indices), dtype=np.int64)}


Make = Callable[[Plan, IndexRows, int], StepReader]


def plan_of(n: int, split: tuple[int, int, int], remainder: str) -> Plan:
    b, w, k = split
    recipe = tiny_recipe(
        seed=11,
        data={"samples": n},
        batch={"effective": EFFECTIVE, "per_device": b, "gpus": w, "accumulation": k,
               "remainder": remainder},
        duration={"steps": None, "epochs": EPOCHS},
    )  # fmt: skip
    return resolve(validate(recipe, "r"), World(samples=n))


def run(plan: Plan, rows: IndexRows, make: Make, first: int = 1) -> list[tuple[list[int], str]]:
    """Each step's samples, put together over micro-batches and ranks, and its digest."""
    readers = [make(plan, rows, rank) for rank in range(plan.batch.gpus)]
    result = []
    for number in range(first, plan.steps.total + 1):
        steps = [reader.read(number) for reader in readers]
        samples: list[int] = []
        for micro_batches in zip(*(step.micro_batches for step in steps), strict=True):
            for micro_batch in micro_batches:
                if not micro_batch.is_dummy:
                    samples += micro_batch.tensors["features"].tolist()
                else:
                    assert (micro_batch.tensors["targets"] == -100).all()
        assert len({step.digest for step in steps}) == 1
        assert len({step.weight for step in steps}) == 1
        result.append((samples, steps[0].digest))
    return result


def check_matrix(n: int, remainder: str, make: Make = StepReader) -> None:
    """Same ordered samples at every step of every split; each once per epoch; resume continues."""
    rows = IndexRows(n)
    reference = run(plan_of(n, (12, 1, 1), remainder), rows, make)
    flat = [index for samples, _ in reference for index in samples]
    per_epoch = n - n % EFFECTIVE if remainder == "drop" else n
    assert len(flat) == per_epoch * EPOCHS
    epochs = [flat[e * per_epoch : (e + 1) * per_epoch] for e in range(EPOCHS)]
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch
        assert set(epoch) <= set(range(n))
    assert epochs[0] != epochs[1] != epochs[2]
    for samples, digest in reference:
        assert digest == order.digest(np.array(samples))
    for split in SPLITS:
        plan = plan_of(n, split, remainder)
        assert run(plan, rows, make) == reference
        for stop in range(1, plan.steps.total):
            assert run(plan, rows, make, first=stop + 1) == reference[stop:]


@pytest.mark.parametrize("remainder", ["keep", "drop", "carry"])
@pytest.mark.parametrize("n", [96, 100, 103])
def test_every_split_reads_the_same_samples(n: int, remainder: str) -> None:
    """W in 1..4, every split of 12, three epochs: identical ordered indices, also after a resume."""
    check_matrix(n, remainder)


class Planted(StepReader):
    """A reader with a fault: the samples of a step are those of `planted`."""

    def _samples(self, number: int) -> Any:
        return self.planted(number), super()._samples(number)[1]

    def planted(self, number: int) -> Any:
        raise NotImplementedError


class SeedByRank(Planted):
    """Planted fault: each rank shuffles with its own seed."""

    def planted(self, number: int) -> Any:
        recipe = self._plan.recipe.model_copy(update={"seed": 11 + self._data_rank})
        twin = StepReader(
            dataclasses.replace(self._plan, recipe=recipe), self._rows, self._data_rank
        )
        return twin.step_indices(number)


class ForgetEpoch(Planted):
    """Planted fault: every epoch has the order of the first."""

    def planted(self, number: int) -> Any:
        first, end = self._clock.slots(number)
        n = self._clock.samples
        whole = order.indices(self._plan.recipe.seed, n, 1, 0, n)
        return whole[np.arange(first, end) % n]


class ShuffleAfterSharding(Planted):
    """Planted fault: rank r shuffles the r-th part of the data by itself."""

    def planted(self, number: int) -> Any:
        w = self._plan.batch.gpus
        first, end = self._clock.slots(number)
        n = self._clock.samples
        part = n // w
        places = np.arange(first, end)
        shard = order.indices(self._plan.recipe.seed, part, 1, 0, part)
        return (places % w) * part + shard[places // w % part]


@pytest.mark.parametrize("fault", [SeedByRank, ForgetEpoch, ShuffleAfterSharding])
def test_planted_faults_turn_the_matrix_red(fault: Make) -> None:
    """The matrix is a check that can fail: three classic mistakes are each caught."""
    with pytest.raises(AssertionError):
        check_matrix(100, "keep", fault)
