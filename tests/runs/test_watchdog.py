"""Who is late, and who only waits for them; two signals that mean now, and two that do not."""

import os
import signal
import socket
from pathlib import Path

import pytest

from toolkit import processes
from toolkit.patience import Patience
from toolkit.processes import Process, free_port
from toolkit.rank_files import RankFiles
from toolkit.runs.signals import Signals
from toolkit.runs.stragglers import STEPS, Stragglers
from toolkit.runs.watchdog import Watchdog


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def two_ranks(folder: Path) -> list[RankFiles]:
    return [RankFiles(folder, rank) for rank in (0, 1)]


def test_the_rank_with_the_fewest_places_is_late(tmp_path: Path) -> None:
    """Rank 0 waits in backward for rank 1, which sleeps in forward: rank 1 is named, after the timeout."""
    ranks, clock = two_ranks(tmp_path), Clock()
    beats = [files.open_beat() for files in ranks]
    watchdog = Watchdog(ranks, Patience(10.0), clock)
    for place in ("begin", "forward of micro-batch 1 of 1"):
        for beat in beats:
            beat(6, 7, place)
    beats[0](6, 7, "backward of micro-batch 1 of 1")
    assert not watchdog.stuck()
    clock.now = 9.9
    assert not watchdog.stuck()
    clock.now = 10.0
    late = watchdog.stuck()
    assert [files.rank for files in late] == [1]
    assert "rank 1 (step 7, forward of micro-batch 1 of 1)" in watchdog.describe(late)


def test_a_rank_that_moves_or_waits_for_a_disk_is_not_late(tmp_path: Path) -> None:
    """A place, a sign of life while waiting, and an outcome all count."""
    ranks, clock = two_ranks(tmp_path), Clock()
    beats = [files.open_beat() for files in ranks]
    watchdog = Watchdog(ranks, Patience(10.0), clock)
    for when in range(0, 100, 6):
        clock.now = float(when)
        beats[0](6, 7, f"place {when}")
        beats[1].wait() if when else beats[1](6, 7, "save")
        assert not watchdog.stuck()
    ranks[0].write_outcome({"outcome": "finished"})
    ranks[1].write_outcome({"outcome": "finished"})
    clock.now = 1000.0
    assert not watchdog.stuck()


def test_a_start_may_take_longer(tmp_path: Path) -> None:
    """Imports, loading and compiling have ten minutes, also where a step has ten seconds."""
    ranks, clock = two_ranks(tmp_path), Clock()
    ranks[0].open_beat()(0, 0, "warm-up")
    watchdog = Watchdog(ranks, Patience(10.0), clock)
    watchdog.stuck()
    clock.now = 599.0
    assert not watchdog.stuck()
    clock.now = 601.0
    assert [files.rank for files in watchdog.stuck()] == [1]


@pytest.mark.parametrize(
    ("numbers", "at_once"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGUSR1, signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGTERM], False),
    ],
)
def test_only_a_second_ctrl_c_means_now(numbers: list[signal.Signals], at_once: bool) -> None:
    """A scheduler's warning followed by its SIGTERM must not cut a save short."""
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        for number in numbers:
            os.kill(os.getpid(), number)
        assert signals.first == numbers[0]
        assert signals.at_once == at_once
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_is_told_from_another_with_its_number() -> None:
    """The same number with another start time is another process, and gets no signal."""
    here = Process.current()
    assert here.is_alive
    assert Process.parse(str(here)) == here
    other = Process(here.pid, here.started + 1, here.host)
    assert not other.is_alive
    other.send(signal.SIGKILL)
    assert not Process(here.pid, here.started, "elsewhere").is_alive
    assert Process.parse("12 x host") is None


def test_a_free_port_is_none_that_the_system_gives_away() -> None:
    """Another's socket that asks for any port, opened between the choice and its use, cannot take it."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [free_port() for _ in range(50)]
    assert not any(first <= port <= last for port in ports)
    assert len(set(ports)) > 40
    with socket.socket() as taken:
        taken.bind(("", ports[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "_PORTS", range(ports[0], ports[0] + 2))
            assert {free_port() for _ in range(20)} == {ports[0] + 1}


def test_a_step_many_times_the_median_is_a_hang(tmp_path: Path) -> None:
    """After ten steps of 2 s, a factor of 4 means 8 s in a step, and changes nothing in a save."""
    ranks, clock = two_ranks(tmp_path), Clock()
    beats = [files.open_beat() for files in ranks]
    watchdog = Watchdog(ranks, Patience(600.0, factor=4.0), clock)
    for step in range(1, 13):
        clock.now = 2.0 * step
        for beat in beats:
            beat(step - 1, step, "forward of micro-batch 1 of 1")
        assert not watchdog.stuck()
    for beat in beats:
        beat(11, 12, "save")
    assert not watchdog.stuck()
    clock.now += 100.0
    assert not watchdog.stuck()
    for beat in beats:
        beat(11, 13, "forward of micro-batch 1 of 1")
    assert not watchdog.stuck()
    clock.now += 7.9
    assert not watchdog.stuck()
    clock.now += 0.2
    late = watchdog.stuck()
    assert [files.rank for files in late] == [0, 1]
    assert "did not move for 8 s (launch.hang_factor)" in watchdog.describe(late)


@pytest.mark.parametrize(("slow_ms", "is_named"), [(50, True), (19, False)])
def test_a_rank_that_computes_more_slowly_is_named_once(
    tmp_path: Path, slow_ms: int, is_named: bool
) -> None:
    """By its forwards, against the median of all, with its host; again only after it had recovered."""
    ranks = [RankFiles(tmp_path, rank) for rank in range(4)]
    beats = [files.open_beat() for files in ranks]
    ranks[2].write_device({"host": "node-7"})
    stragglers = Stragglers(ranks, 2.0)
    said, busy = [], [0, 0, 0, 0]
    for step in range(4 * STEPS + 1):
        recovered = 2 * STEPS < step <= 3 * STEPS
        for rank, beat in enumerate(beats):
            ms = slow_ms if rank == 2 and not recovered else 10
            busy[rank] += ms if step else 0
            beat(step, step + 1, "begin", busy[rank])
        if words := stragglers.look():
            said.append(words)
    expected = "straggler: rank 2 on node-7: its forwards take 50 ms a step, the median is 10"
    assert [words.partition(" (")[0] for words in said] == ([expected] * 2 if is_named else [])
