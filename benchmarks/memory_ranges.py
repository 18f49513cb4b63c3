"""How far apart are closed form and trace, and what does the allocator reserve beyond what is alive?

    python benchmarks/memory_ranges.py [--plans 48] [--seed 1]

Draws plans of realistic sizes (fake tensors cost the same whatever their size), rehearses each, and
replays its allocations through the model of the CUDA caching allocator, classic and expandable.
Ratios are of what moves: (reserved - states) / (allocated - states). `toolkit/drumline/memory/ranges.py`
quotes its quantiles. Needs no GPU.
"""

import argparse
import random
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from drumline.memory.allocator import CachingAllocator
from drumline.trace.rehearse import rehearse
from memory.plans import large_plan

STATES = ("parameters", "gradients", "optimizer")


def quantiles(values: list[float]) -> str:
    """Smallest, median, 90 % and largest."""
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return f"{ordered[0]:7.3f} {statistics.median(ordered):7.3f} {high:7.3f} {ordered[-1]:7.3f}"


def main() -> None:
    """Print two tables."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    errors: list[float] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.plans):
        words, plan = large_plan(draw)
        recording = rehearse(plan)
        peak = recording.peak()
        closed = max(plan.memory.phases.values()) - plan.memory.parts["workspace"]
        errors.append(100 * (closed / peak.bytes - 1))
        states = sum(s for n, s in peak.alive.items() if recording.parts.get(n) in STATES)
        row = f"{words:<110} {peak.bytes / 2**30:7.2f} GiB {errors[-1]:+6.2f} %"
        for kind, expandable in (("classic", False), ("expandable", True)):
            allocator = CachingAllocator(expandable)
            allocator.replay(recording.events)
            moving = allocator.peak_allocated - states
            ratio = (allocator.peak_reserved - states) / moving
            ratios.setdefault((plan.recipe.strategy.name, kind), []).append(ratio)
            row += f" {ratio:6.3f}"
        print(row, flush=True)
    print(f"\nclosed form / trace - 1, %, of {len(errors)}: {quantiles(errors)}")
    print("reserved / allocated of what moves    min  median    90 %     max")
    for (strategy, kind), values in sorted(ratios.items()):
        print(f"{strategy:<5} {kind:<12} ({len(values):>2} plans)      {quantiles(values)}")


if __name__ == "__main__":
    main()
