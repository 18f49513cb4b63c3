"""How many allocations a second does the model of the CUDA caching allocator replay?

    python benchmarks/allocator.py [--rounds 5]

Replays the events of one traced plan (gpt2-124m) with classic and expandable segments, in turns. The
aim is 100,000 a second.
"""

import argparse
import statistics
import time
import warnings

from drumline.memory.allocator import CachingAllocator
from drumline.plan.resolve import resolve
from drumline.recipe.load import load_recipe
from drumline.trace.rehearse import rehearse


def main() -> None:
    """Print one table."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    events = rehearse(resolve(load_recipe("gpt2-124m-h200"))).events
    rates: dict[str, list[float]] = {"classic": [], "expandable": []}
    for _ in range(rounds):
        for kind, values in rates.items():
            allocator = CachingAllocator(expandable=kind == "expandable")
            started = time.perf_counter()
            allocator.replay(events)
            values.append(len(events) / (time.perf_counter() - started))
    print(f"{len(events):,} events, {rounds} rounds in turns")
    for kind, values in rates.items():
        print(f"{kind:<12} {statistics.median(values):>12,.0f} a second (median)")


if __name__ == "__main__":
    main()
