"""How far apart are closed form and trace: allocated and reserved bytes, and their verdicts?

    python benchmarks/memory_ranges.py [--plans 48] [--seed 1]

Draws plans of realistic sizes (fake tensors cost the same whatever their size), rehearses each, and
replays both lists of allocations through the model of the CUDA caching allocator.
`toolkit/drumline/memory/ranges.py` quotes its quantiles. Needs no GPU.
"""

import argparse
import random
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from drumline.architectures.gpus import find_gpu
from drumline.plan.traced import traced_facts
from drumline.trace.rehearse import rehearse
from memory.plans import large_plan

TOTALS = ("allocated", "reserved")


def quantiles(values: list[float]) -> str:
    """Smallest, median, 90 % of the sizes, and largest."""
    ordered = sorted(values)
    sizes = sorted(abs(value) for value in values)
    wide = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return f"{ordered[0]:+7.2f} {statistics.median(ordered):+7.2f} {wide:7.2f} {ordered[-1]:+7.2f}"


def main() -> None:
    """Print a line for each plan, and a table."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    errors: dict[tuple[str, str], list[float]] = {}
    agreed = 0
    for _ in range(arguments.plans):
        words, plan = large_plan(draw)
        traced = traced_facts(rehearse(plan).traced(), plan, find_gpu(plan.recipe.cluster.gpu))
        agreed += traced.verdict == plan.memory.verdict
        row = f"{words:<110}"
        for name in TOTALS:
            for end in ("expected", "high"):
                closed, found = (getattr(getattr(m, name), end) for m in (plan.memory, traced))
                error = 100 * (closed / found - 1)
                errors.setdefault((name, end), []).append(error)
                row += f" {name} {end} {found / 2**30:6.2f} GiB {error:+6.2f} %"
        print(f"{row} {plan.memory.verdict}, traced {traced.verdict}", flush=True)
    print("\nclosed form / trace - 1, %         min  median  90 %     max")
    for (name, end), values in errors.items():
        print(f"{name:<10} {end:<9} ({len(values):>2} plans)  {quantiles(values)}")
    print(f"the same verdict: {agreed} of {arguments.plans}")


if __name__ == "__main__":
    main()
