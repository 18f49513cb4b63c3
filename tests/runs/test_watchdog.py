"""Who is late, and who only waits for them; two signals that mean now, and two that do not."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from drumline import processes
from drumline.hang_timeout import HangTimeout
from drumline.phases import Phase
from drumline.processes import Process, free_port
from drumline.rank_files import Heartbeat, RankFiles
from drumline.supervise.ranks import Ranks
from drumline.supervise.signals import Signals
from drumline.supervise.stragglers import STEPS, Stragglers
from drumline.supervise.watchdog import Watchdog


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Some ranks that report, and a watchdog that looks at a time of the test's."""

    def __init__(self, folder: Path, count: int, hang_timeout: HangTimeout) -> None:
        self.clock = Clock()
        self.ranks = Ranks(folder, count, self.clock)
        self.writers = [files.open_heartbeat() for files in self.ranks.files]
        self.watchdog = Watchdog(self.ranks, hang_timeout, self.clock)

    def enter(self, rank: int, phase: Phase, done: int = 6, step: int = 7, **more: Any) -> None:
        self.writers[rank].enter(Heartbeat(done=done, step=step, phase=phase, **more))

    def late(self, now: float) -> list[int]:
        self.clock.now = now
        self.ranks.refresh()
        return [view.rank for view in self.watchdog.late_ranks()]


def test_the_rank_with_the_fewest_phases_is_late(tmp_path: Path) -> None:
    """Rank 0 waits in backward for rank 1, which sleeps in forward: rank 1 is named, after the timeout."""
    watched = Watched(tmp_path, 2, HangTimeout(10.0))
    for phase, detail in ((Phase.STEP_BEGINS, ""), (Phase.FORWARD, "micro-batch 1 of 1")):
        for rank in (0, 1):
            watched.enter(rank, phase, detail=detail)
    watched.enter(0, Phase.BACKWARD, detail="micro-batch 1 of 1")
    assert not watched.late(0.0)
    assert not watched.late(9.9)
    assert watched.late(10.0) == [1]
    words = watched.watchdog.describe(watched.watchdog.late_ranks())
    assert "rank 1 (step 7, forward of micro-batch 1 of 1)" in words


def test_a_rank_that_moves_or_waits_for_a_disk_is_not_late(tmp_path: Path) -> None:
    """A phase, a sign of life while waiting, and an outcome all count."""
    watched = Watched(tmp_path, 2, HangTimeout(10.0))
    for when in range(0, 100, 6):
        watched.enter(0, Phase.EVALUATING, detail=f"micro-batch {when}")
        watched.writers[1].wait() if when else watched.enter(1, Phase.SAVING)
        assert not watched.late(float(when))
    for rank, files in enumerate(watched.ranks.files):
        files.write_outcome({"outcome": "finished"})
        watched.enter(rank, Phase.ENDED)
    assert not watched.late(1000.0)


def test_a_start_may_take_longer(tmp_path: Path) -> None:
    """A rank that does not start has three minutes, imports ten, a compilation thirty; a step here ten seconds."""
    watched = Watched(tmp_path, 2, HangTimeout(10.0))
    watched.enter(0, Phase.IMPORTING, done=0, step=0)
    assert not watched.late(0.0)
    assert not watched.late(179.0)
    assert watched.late(181.0) == [1]
    watched.enter(1, Phase.WARMING_UP, done=0, step=0)
    assert not watched.late(599.0)
    assert watched.late(601.0)
    watched.enter(0, Phase.WARMING_UP, done=0, step=0)
    assert not watched.late(1900.0)
    assert watched.late(602.0 + 1801.0)


@pytest.mark.parametrize(("is_remote", "limit_s"), [(False, 180.0), (True, 900.0)])
@pytest.mark.parametrize("timeout_s", [1.0, 10_000.0])
def test_a_start_that_makes_no_progress_has_a_limit_of_its_own(
    timeout_s: float, is_remote: bool, limit_s: float
) -> None:
    """Whatever hang_timeout_s is; longer where a node may first fetch its image."""
    assert HangTimeout(timeout_s, None, is_remote).limit_s(None) == limit_s


def test_a_save_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """A rank that says how long its save may take has so long, however tight the hang timeout is."""
    watched = Watched(tmp_path, 1, HangTimeout(10.0))
    watched.enter(0, Phase.SAVING, limit_s=300.0)
    assert not watched.late(0.0)
    assert not watched.late(299.0)
    assert watched.late(301.0) == [0]


def test_heartbeats_cost_the_training_thread_no_system_call(tmp_path: Path) -> None:
    """Ten thousand phases are seen at once by another process of this host, and synced once."""
    files = RankFiles(tmp_path, 0)
    writer = files.open_heartbeat()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "write", "pwrite", "fsync"):
            patch.setattr(os, name, lambda *a, **k: pytest.fail("a system call"))
        for step in range(10_000):
            writer.enter(Heartbeat(step=step, phase=Phase.FORWARD))
    seen = files.heartbeat()
    assert seen
    assert (seen.step, seen.count) == (9_999, 10_000)
    assert writer.sync()
    assert not writer.sync()


def test_the_supervisor_opens_few_files(tmp_path: Path) -> None:
    """However many ranks there are, at most 256 heartbeats are opened a second."""
    clock = Clock()
    few, many = Ranks(tmp_path, 8, clock), Ranks(tmp_path, 1024, clock)
    for ranks, interval_s in ((few, 0.1), (many, 4.0)):
        ranks.refresh()
        assert not ranks.is_due()
        clock.now += interval_s - 0.01
        assert not ranks.is_due()
        clock.now += 0.02
        assert ranks.is_due()


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
    watched = Watched(tmp_path, 2, HangTimeout(600.0, factor=4.0))

    def both(phase: Phase, done: int, step: int) -> None:
        for rank in (0, 1):
            watched.enter(rank, phase, done=done, step=step)

    for step in range(1, 13):
        both(Phase.FORWARD, step - 1, step)
        assert not watched.late(2.0 * step)
    both(Phase.SAVING, 11, 12)
    assert not watched.late(24.0)
    assert not watched.late(124.0)
    both(Phase.FORWARD, 11, 13)
    assert not watched.late(124.0)
    assert not watched.late(131.9)
    assert watched.late(132.1) == [0, 1]
    words = watched.watchdog.describe(watched.watchdog.late_ranks())
    assert "did not move for 8 s (launch.hang_factor)" in words


@pytest.mark.parametrize(("slow_ms", "is_named"), [(50, True), (19, False)])
def test_a_rank_that_computes_more_slowly_is_named_once(
    tmp_path: Path, slow_ms: int, is_named: bool
) -> None:
    """By its forwards, against the median of all, with its host; again only after it had recovered."""
    ranks = Ranks(tmp_path, 4)
    writers = [files.open_heartbeat() for files in ranks.files]
    ranks.files[2].write_device({"host": "node-7"})
    stragglers = Stragglers(ranks, 2.0)
    said, busy = [], [0, 0, 0, 0]
    for step in range(4 * STEPS + 1):
        recovered = 2 * STEPS < step <= 3 * STEPS
        for rank, writer in enumerate(writers):
            ms = slow_ms if rank == 2 and not recovered else 10
            busy[rank] += ms if step else 0
            writer.enter(Heartbeat(done=step, step=step + 1, busy_ms=busy[rank]))
        ranks.refresh()
        if words := stragglers.look():
            said.append(words)
    expected = "straggler: rank 2 on node-7: its forwards take 50 ms a step, the median is 10"
    assert [words.partition(" (")[0] for words in said] == ([expected] * 2 if is_named else [])
