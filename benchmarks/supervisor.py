"""What does supervising cost, by the number of ranks?

    python benchmarks/supervisor.py [--seconds 20]

Ranks are files only, as those of other hosts are: each has a process file and a heartbeat, and all of them move
between two looks. Prints, for each number of ranks, how often the supervisor looks, the CPU time of one look
(heartbeats read and parsed, hang and straggler rules applied), files opened a second, and the share of one core.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from drumline.hang_timeout import HangTimeout
from drumline.phases import Phase
from drumline.processes import Process
from drumline.rank_files import Heartbeat
from drumline.supervise.ranks import Ranks
from drumline.supervise.stragglers import Stragglers
from drumline.supervise.watchdog import Watchdog


def measure(count: int, seconds: float) -> tuple[float, float, float]:
    """Seconds between looks, CPU seconds of a look, and files opened a second."""
    with tempfile.TemporaryDirectory() as name:
        ranks = Ranks(Path(name), count)
        writers = [files.open_heartbeat() for files in ranks.files]
        for rank in range(count):
            (Path(name) / f"rank-{rank}.pid").write_text(str(Process(1000 + rank, 1, "other-host")))
        watchdog, stragglers = Watchdog(ranks, HangTimeout(600.0)), Stragglers(ranks, 2.0)
        cpu, looks, opened, step = 0.0, 0, 0, 0
        real = os.open

        def counted(*arguments: object, **options: object) -> int:
            nonlocal opened
            opened += 1
            return real(*arguments, **options)  # type: ignore[arg-type]

        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if not ranks.is_due():
                time.sleep(0.02)
                continue
            step += 1
            for writer in writers:
                writer.enter(Heartbeat(done=step, step=step + 1, busy_ms=step, phase=Phase.FORWARD))
            os.open = counted  # type: ignore[assignment]
            started = time.process_time()
            ranks.refresh()
            assert not watchdog.late_ranks()
            stragglers.look()
            cpu += time.process_time() - started
            os.open = real
            looks += 1
        elapsed = time.monotonic() - began
        return elapsed / looks, cpu / looks, opened / elapsed


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    print(
        f"{'ranks':>6} {'look every s':>13} {'CPU ms a look':>14} {'files/s':>8} {'of a core':>10}"
    )
    for count in (8, 64, 256, 1024):
        every, cpu, files = measure(count, seconds)
        print(f"{count:>6} {every:>13.2f} {1000 * cpu:>14.2f} {files:>8.0f} {cpu / every:>10.2%}")


if __name__ == "__main__":
    main()
