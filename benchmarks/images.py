"""Does the reader of images keep pace with torch's DataLoader, with the same decoding and augmentation?

    python benchmarks/images.py [--images 600] [--rounds 5] [--workers 0 1 2]

JPEG files of 500 × 375 pixels, as ImageNet's are on average, random crops to 224, mirrored, in micro-batches of 32. `ours`:
`load` of `train/read_ahead.py` on prepared rows, each image with the seed of its slot. `torch`: a DataLoader with a
data set that opens the same files and runs the same pipeline, in batches of 32, without seeds to keep. Both in
this process, in turns; rows a second, by the median of the rounds, without the start of the workers.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader, Dataset

from drumline.data.images import pipeline
from drumline.plan.model import Plan
from drumline.plan.order import draw_seeds
from drumline.recipe.image_section import Image
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.train.batches import MicroBatches, Request, open_rows
from drumline.train.read_ahead import load

ROWS, SPEC = 32, {"size": 224}


class Files(Dataset[Any]):
    """The files as a data set for a DataLoader."""

    def __init__(self, files: list[Path]) -> None:
        self._files, self._pipeline = files, pipeline(Image.model_validate(SPEC), None)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        seed = int(torch.randint(0, 2**62, ()))
        pixels = self._pipeline.pixels(self._files[number].read_bytes(), seed, is_trained=True)
        return torch.from_numpy(pixels), int(self._files[number].parent.name)


def write(folder: Path, count: int) -> list[Path]:
    """So many JPEG files of smooth noise in two classes."""
    files = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 255, (25, 33, 3), dtype=np.uint8)
        path = folder / str(number % 2) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(coarse).resize((500, 375)).save(path, quality=92)
        files.append(path)
    return files


def plan_of(folder: Path) -> Plan:
    """A plan whose rows are these images."""
    recipe = validate({
        "recipe": "images", "schema": 1, "seed": 1,
        "model": {"source": "config", "architecture": "vit", "config": {"num_hidden_layers": 1}},
        "data": {"source": "files", "path": str(folder), "task": "classification", "image_field": "image", "image": SPEC},
        "batch": {"effective": ROWS, "per_device": ROWS, "gpus": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 1}}, "r")  # fmt: skip
    prepare_data(recipe)
    return make_plan(recipe)


def ours(plan: Plan, workers: int) -> Iterator[Any]:
    """Micro-batches of one epoch."""
    rows = open_rows(plan, "train")
    requests = [
        Request(indices, draw_seeds(1, indices), False)
        for start in range(0, len(rows), ROWS)
        for indices in [np.arange(start, min(start + ROWS, len(rows)))]
    ]
    return load(MicroBatches(plan, rows), requests, workers)


def theirs(files: list[Path], workers: int) -> Iterator[Any]:
    """The same by a DataLoader of files."""
    options: dict[str, Any] = {"multiprocessing_context": "forkserver"} if workers else {}
    return iter(DataLoader(Files(files), batch_size=ROWS, num_workers=workers, **options))


def rate(batches: Iterator[Any], count: int) -> float:
    """Rows a second after the first micro-batch."""
    next(batches)
    started = time.perf_counter()
    seen = sum(1 for _ in batches)
    assert seen == -(-count // ROWS) - 1
    return (count - ROWS) / (time.perf_counter() - started)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DRUMLINE_CACHE"] = f"{folder}/cache"
        files = write(Path(folder) / "images", arguments.images)
        plan = plan_of(Path(folder) / "images")
        size = sum(path.stat().st_size for path in files) / len(files) / 1e3
        print(
            f"{arguments.images} JPEG of {size:.0f} kB, {os.cpu_count()} cores, torch {torch.__version__}"
        )
        print("workers   ours rows/s   torch rows/s   ours / torch (rounds)")
        for workers in arguments.workers:
            found: dict[str, list[float]] = {"ours": [], "torch": []}
            for number in range(arguments.rounds):
                turns = [("ours", partial(ours, plan)), ("torch", partial(theirs, files))]
                for name, make in itertools.chain(turns[number % 2 :], turns[: number % 2]):
                    found[name].append(rate(make(workers), arguments.images))
            ratios = [a / b for a, b in zip(found["ours"], found["torch"], strict=True)]
            mine, other = (statistics.median(found[name]) for name in ("ours", "torch"))
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"{workers:>7}   {mine:>11.0f}   {other:>12.0f}   {statistics.median(ratios):.2f} ({spread})"
            )


if __name__ == "__main__":
    main()
