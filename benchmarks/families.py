"""Every family: the closed form's bytes against the trace's, at 3 shapes × 3 precisions × 3 strategies.

    python benchmarks/families.py [FAMILY…]

Prints for each family the median and the worst relative difference of allocated bytes over 27 combinations
(tests/memory/family_grid.py). Needs no GPU; all families take about ten minutes.
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from memory.family_grid import cells
from memory.plans import SMALL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(SMALL))
    warnings.simplefilter("ignore")
    print(f"{'family':<14} {'median':>8} {'worst':>8}")
    everything: list[float] = []
    for name in parser.parse_args().families:
        errors = [cell.error for cell in cells(name, is_all=True)]
        everything += errors
        worst = max(errors, key=abs)
        print(f"{name:<14} {statistics.median(map(abs, errors)):>8.2%} {worst:>+8.2%}", flush=True)
    print(
        f"{'all':<14} {statistics.median(map(abs, everything)):>8.2%} {max(everything, key=abs):>+8.2%}"
    )


if __name__ == "__main__":
    main()
