"""What grows with the cluster? Costs at 1 to 16,384 ranks, simulated on one machine.

    python benchmarks/scale.py [--ranks 1 64 1024 16384] [--load 64 1024]

For each number of ranks: CPU time of planning a 70B model (one row on each rank); of finding the samples of a step,
which every rank does for the whole effective batch; of one look of the supervisor at all heartbeats, with the
files that it opens a second; and of reading what all ranks leave at the end of an attempt. The supervisor's
ranks are files only, as those of other hosts are.

Then a checkpoint of the 70B model under FSDP2: bytes that a rank reads and files that it opens, the largest and
in all, where as many ranks load it as saved it and where half as many do, and the seconds that rank 0 takes to
work that out for all.
"""

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from supervisor import measure

from drumline.architectures.shapes import layer_tensors, outer_tensors
from drumline.checkpoint.boxes import boxes_of_range, overlap
from drumline.checkpoint.shards import shard_name
from drumline.plan.model import Plan
from drumline.plan.order import draw_seeds, slot_indices
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.world import World
from drumline.rank_files import RankFiles
from drumline.recipe.load import load_recipe
from drumline.runs.peaks import memory_entry
from drumline.train.shard_sources import Told, grouped, own_parts, share_out

ROUNDS = 5
SAMPLES = 10**9


def median_ms(work: Callable[[], Any]) -> float:
    """Median CPU milliseconds of some calls."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - began))
    return statistics.median(found)


def plan_of(ranks: int) -> Plan:
    """The 70B recipe on so many GPUs, one row on each."""
    from drumline.memory import closed_form, rank

    for kept in (closed_form.estimate, rank.play, rank.events):
        kept.cache_clear()
    gpus = [f"batch.gpus={ranks}", f"batch.effective={ranks}", "batch.per_device=1", "batch.accumulation=1",
            f"cluster.nodes={max(1, ranks // 8)}", f"cluster.gpus_per_node={min(8, ranks)}"]  # fmt: skip
    return resolve(load_recipe("llama-70b-64xh100", gpus), World(samples=SAMPLES))


def read_ends(plan: Plan, ranks: int) -> float:
    """CPU milliseconds of reading the outcomes of all ranks."""
    with tempfile.TemporaryDirectory() as name:
        files = [RankFiles(Path(name), rank) for rank in range(ranks)]
        for one in files:
            one.write_outcome({"outcome": "finished", "memory": {"allocated": 1, "reserved": 1, "device": 1}})  # fmt: skip
        return median_ms(lambda: memory_entry(plan, files))


def costs(ranks: int, seconds: float) -> str:
    """One line of the first table."""
    plan = plan_of(ranks)
    planning = median_ms(lambda: plan_of(ranks))
    places = np.arange(10**8, 10**8 + ranks)
    order = median_ms(
        lambda: [
            slot_indices(17, SAMPLES, 10**8, 10**8 + ranks),
            draw_seeds(17, places),
        ]
    )
    every, cpu, files = measure(ranks, seconds)
    return (
        f"{ranks:>6} {planning:>9.0f} {order:>9.2f} {1e3 * cpu:>11.1f} {every:>9.2f} {files:>8.0f} "
        f"{cpu / every:>7.1%} {read_ends(plan, ranks):>9.0f}"
    )


def tensors() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of the 70B model: weights and AdamW's two moments."""
    shape = shape_of(load_recipe("llama-70b-64xh100"), World())
    assert not isinstance(shape, str)
    whole = {
        f"layers.{n}.{name}": sizes
        for n in range(shape.layers)
        for name, sizes in layer_tensors(shape).items()
    }
    whole |= outer_tensors(shape)
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {f"{kind}.{name}": sizes for kind in kinds for name, sizes in whole.items()}  # fmt: skip


def shards(whole: dict[str, tuple[int, ...]], ranks: int) -> Iterator[dict[str, Any]]:
    """Of each rank, its boxes of every tensor: dimension 0 is split like torch.chunk."""
    for rank in range(ranks):
        own = {}
        for name, sizes in whole.items():
            rows = sizes[0]
            a, b = (min(rows, place * -(-rows // ranks)) for place in (rank, rank + 1))
            each = int(np.prod(sizes[1:], dtype=np.int64))
            if b > a:
                own[name] = boxes_of_range(sizes, a * each, (b - a) * each)
        yield own


def loading(saved: int, here: int) -> str:
    """One line of the second table."""
    whole = tensors()
    entries = [
        {
            name: {"shape": list(whole[name]), "boxes": boxes, "file": shard_name(rank)}
            for name, boxes in own.items()
        }
        for rank, own in enumerate(shards(whole, saved))
    ]
    needs = [
        {name: (whole[name], boxes) for name, boxes in own.items()} for own in shards(whole, here)
    ]
    hands = [
        own_parts(need, entries[rank] if rank < saved else {}) for rank, need in enumerate(needs)
    ]
    known = {
        name
        for name in whole
        if all(name not in n or name in h for n, h in zip(needs, hands, strict=True))
    }
    names = sorted(set(whole) - known)
    told = [
        Told(
            saved=grouped(
                (name, whole[name], entry["boxes"], entry["file"])
                for found in entries[rank::here]
                for name, entry in found.items()
                if name not in known
            ),
            needed=grouped((n, *need, "") for n, need in needs[rank].items() if n not in known),
            names=names if rank == 0 else [],
        )
        for rank in range(here)
    ]
    told = [pickle.loads(pickle.dumps(one)) for one in told]
    began = time.process_time()
    own_parts(needs[0], entries[0])
    answers = share_out(Path("checkpoint"), told, False)
    seconds = time.process_time() - began
    answers = [{**answer, **hand} for answer, hand in zip(answers, hands, strict=True)]
    opened = [len({source.file for found in mine.values() for source in found}) for mine in answers]
    read = [
        4 * sum(
            cut.volume
            for name, found in mine.items()
            for source in found
            for one in source.boxes
            for other in need[name][1]
            if (cut := overlap(one, other))
        )
        for mine, need in zip(answers, needs, strict=True)
    ]  # fmt: skip
    gb = 1e9
    return (
        f"{saved:>6} {here:>6} {max(read) / gb:>11.2f} {sum(read) / gb:>9.0f} {max(opened):>12} "
        f"{sum(opened):>9} {seconds:>9.1f}"
    )


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 64, 1024, 16384])
    parser.add_argument("--load", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--seconds", type=float, default=20.0, help="of watching, for each number")
    arguments = parser.parse_args()
    print(
        f"{'ranks':>6} {'plan, ms':>9} {'order, ms':>9} {'a look, ms':>11} {'every, s':>9} {'files/s':>8} "
        f"{'of core':>7} {'ends, ms':>9}"
    )
    for ranks in arguments.ranks:
        print(costs(ranks, arguments.seconds), flush=True)
    print(
        f"\n{'saved':>6} {'loaded':>6} {'GB a rank':>11} {'GB in all':>9} {'files a rank':>12} {'in all':>9} "
        f"{'rank 0, s':>9}"
    )
    for ranks in arguments.load:
        for here in (ranks, ranks // 2):
            print(loading(ranks, here), flush=True)


if __name__ == "__main__":
    main()
