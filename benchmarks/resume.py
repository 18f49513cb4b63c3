"""Does the time until a resumed run's first step grow with the step, the data, or the length of its metrics?

    python benchmarks/resume.py [--rounds 5] [--lines 1000 100000 10000000]

Three parts of a resume that could grow, each alone: finding the samples of the step that comes next, of 10^3 to
10^12 samples, at the beginning and near the end of the hundredth epoch; opening metrics.jsonl, from which the
steps after the checkpoint are cut, with so many lines before it; and what a supervisor asks of that file (its
last step). Milliseconds, medians. The rest of a resume is as long as the start of a new run (first_step.py).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drumline.metrics_file import MetricsFile, last_step_line
from drumline.plan.order import slot_indices

BATCH, EPOCHS = 256, 100


def median_ms(rounds: int, work: Callable[[], Any]) -> float:
    """Median milliseconds of some calls."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def order(rounds: int) -> None:
    """By the number of samples."""
    print(f"{'samples':>18} {'first step':>11} {'epoch 100':>10}   (ms)")
    for exponent in (3, 6, 9, 12):
        n = 10**exponent
        first = median_ms(rounds, lambda n=n: slot_indices(17, n, 0, BATCH))  # type: ignore[misc]
        end = EPOCHS * n - BATCH
        late = median_ms(rounds, lambda n=n, end=end: slot_indices(17, n, end, end + BATCH))  # type: ignore[misc]
        print(f"{n:>18,} {first:>11.2f} {late:>10.2f}", flush=True)


def metrics(rounds: int, lines: int) -> None:
    """By the length of metrics.jsonl; the checkpoint is ten steps before its end."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "metrics.jsonl"
        with path.open("w") as file:
            for step in range(1, lines + 1):
                file.write(json.dumps({"kind": "step", "step": step, "loss": 2.5, "grad_norm": 0.5, "lr": 3e-4,
                                       "seconds": 0.25, "digest": "0123456789abcdef"}) + "\n")  # fmt: skip
        size = path.stat().st_size
        tail = path.read_bytes()[-4096:].split(b"\n", 1)[1]

        def opened() -> None:
            MetricsFile(path, lines - 10).close()
            with path.open("r+b") as file:  # as it was
                file.seek(size - len(tail))
                file.write(tail)

        ms = median_ms(rounds, opened)
        last = median_ms(rounds, lambda: last_step_line(path))
        assert path.stat().st_size == size
        print(f"{lines:>18,} {size / 1e6:>11.0f} {ms:>10.2f} {last:>10.2f}", flush=True)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, nargs="+", default=[10**3, 10**5, 10**7])
    arguments = parser.parse_args()
    order(arguments.rounds)
    print(f"\n{'lines of metrics':>18} {'MB':>11} {'opened':>10} {'last step':>10}   (ms)")
    for lines in arguments.lines:
        metrics(arguments.rounds, lines)


if __name__ == "__main__":
    main()
