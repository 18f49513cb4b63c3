"""Rows a second of the reader against torch's DataLoader, on a file that is not in memory.

    python benchmarks/reader.py [--gb 8] [--rounds 3] [--workers 0 2] [--folder /large/disk]

A file of so many GB of tokens (rows of 2,048, uint16), read in shuffled order in micro-batches of four. Before
every round the page cache forgets the file, as if it were larger than the memory; each round reads rows of
another epoch. `ours`: drumline's reader with its thread ahead (and the tokens' targets, weights and digests of a
step). `torch`: a DataLoader with a data set on the same memory-mapped file and a RandomSampler, in as many
worker processes as given. Rows a second, medians with the spread, in turns; at the end what a GPU needs at the
rates of step_time.py.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.load import validate
from drumline.train.batches import StepReader, open_rows
from drumline.train.read_ahead import read_ahead

LENGTH, ROWS, STEPS = 2048, 4, 300
NEEDED = {"GPT-2 124M, H100": 167_752, "Llama 1B, H100": 39_341}
"""Tokens a second, measured by step_time.py."""


class Large(Rows):
    """Prepared rows whose tokens are in a file of our own."""

    def __init__(self, plan: Plan, file: Path) -> None:
        small = open_rows(plan, "train")
        self.__dict__.update(small.__dict__)
        tokens = np.memmap(file, dtype="<u2", mode="r")
        count = len(tokens) // LENGTH
        self._columns = {
            "tokens": np.asarray(tokens),
            "starts": np.arange(count, dtype=np.int64) * LENGTH,
            "lengths": np.full(count, LENGTH, dtype=np.int32),
            "skipped": np.zeros(count, dtype=np.int32),
            "counts": np.full(count, LENGTH - 1, dtype=np.int32),
        }
        self.counts = self._columns["counts"]


class Windows(Dataset[Any]):
    """The same rows as torch's users have them: input ids and labels of one row."""

    def __init__(self, file: Path) -> None:
        self._file, self._count = file, file.stat().st_size // 2 // LENGTH
        self._tokens: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if self._tokens is None:
            self._tokens = np.memmap(self._file, dtype="<u2", mode="r")
        row = self._tokens[number * LENGTH : (number + 1) * LENGTH].astype(np.int64)
        ids = torch.from_numpy(row)
        return {"input_ids": ids[:-1], "labels": ids[1:]}


def write(file: Path, gb: float) -> None:
    """Random tokens, in pieces."""
    draw = np.random.default_rng(0)
    with file.open("wb") as out:
        for _ in range(int(gb * 16)):
            out.write(draw.integers(0, 50_000, 31_250_000, dtype=np.uint16).tobytes())
        out.flush()
        os.fsync(out.fileno())


def forget(file: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def ours(file: Path, round_: int) -> Iterator[Any]:
    """Steps of drumline's reader, of the epoch of this round."""
    recipe = validate({
        "recipe": "reader", "schema": 1,
        "model": {"source": "config", "architecture": "llama", "config": {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 257}},
        "data": {"source": "builtin", "name": "python-stdlib", "task": "causal_lm", "sequence_length": LENGTH,
                 "options": {"max_files": 20}},
        "batch": {"per_device": ROWS, "gpus": 1, "accumulation": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 10**8},
    }, "benchmark")  # fmt: skip
    folder = prepare(recipe.data, recipe.project)
    count = file.stat().st_size // 2 // LENGTH
    plan = resolve(recipe, World(samples=count, cache=str(folder), fingerprint="0"))
    first = 1 + round_ * (count // ROWS)
    return read_ahead(StepReader(plan, Large(plan, file), 0), first, first + STEPS)


def theirs(file: Path, workers: int) -> Iterator[Any]:
    """Batches of torch's DataLoader."""
    rows = Windows(file)
    loader: DataLoader[Any] = DataLoader(
        rows, ROWS, sampler=RandomSampler(rows), num_workers=workers
    )
    return iter(loader)


def rate(batches: Iterator[Any]) -> float:
    """Rows a second, after the first batch."""
    next(batches)
    began = time.perf_counter()
    count = sum(1 for _ in islice(batches, STEPS - 10))
    return ROWS * count / (time.perf_counter() - began)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", type=Path, help="where the file is written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        file = Path(name) / "tokens.bin"
        write(file, arguments.gb)
        names = ["drumline", *(f"torch, {count} workers" for count in arguments.workers)]
        found: dict[str, list[float]] = {one: [] for one in names}
        for round_ in range(arguments.rounds):
            for one, count in zip(names, (None, *arguments.workers), strict=True):
                forget(file)
                batches = ours(file, round_) if count is None else theirs(file, count)
                found[one].append(rate(batches))
                del batches
    print(f"{arguments.gb:g} GB, cold, {arguments.rounds} rounds in turns")
    print(f"{'reader':<20} {'rows/s':>8} {'spread':>16} {'ratio':>6}")
    for one, rates in found.items():
        ratio = statistics.median(a / b for a, b in zip(rates, found["drumline"], strict=True))
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{one:<20} {statistics.median(rates):>8,.0f} {spread:>16} {ratio:>6.2f}")
    for one, tokens in NEEDED.items():
        print(f"needed: {tokens / LENGTH:,.0f} rows/s by {one}")


if __name__ == "__main__":
    main()
