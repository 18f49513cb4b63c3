"""How long does it take to find the samples of any step, and does memory grow with N?

    python benchmarks/order.py

For each N, the indices of 200 steps of 1,024 samples at places all over the epoch; the median
time, and the largest allocation that tracemalloc saw. The aim: under 1 ms at 10^12 samples, and
memory that does not grow.
"""

import statistics
import time
import tracemalloc

from drumline.plan.order import indices

BATCH, STEPS = 1024, 200


def main() -> None:
    """Print one table."""
    print(f"{'samples':>16} {'ms per step, median':>20} {'worst':>7} {'peak KiB':>9}")
    for n in (10**4, 10**6, 10**9, 10**12, 10**12 + 39, 10**15):
        places = [k * (n - BATCH) // STEPS for k in range(STEPS)]
        times = []
        for start in places:
            before = time.perf_counter()
            indices(17, n, 3, start, start + BATCH)
            times.append(1000 * (time.perf_counter() - before))
        tracemalloc.start()
        for start in places:
            indices(17, n, 3, start, start + BATCH)
        peak = tracemalloc.get_traced_memory()[1] / 1024
        tracemalloc.stop()
        print(f"{n:>16,} {statistics.median(times):>20.3f} {max(times):>7.3f} {peak:>9.0f}")


if __name__ == "__main__":
    main()
