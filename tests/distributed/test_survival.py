"""Nothing lost: kills, signals, out of memory, hangs, NaN and full disks, through the real supervisor.

Ranks and commands are forked from a process that has everything imported (fork_server.py).
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import Child, ForkServer
from savers import save, try_to_save

from advice import heard
from conftest import ROOT, tiny_recipe
from drumline.checkpoint.manifest import step_of, verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.metrics_file import read_metrics
from drumline.phases import Phase
from drumline.processes import Process
from drumline.rank_files import Heartbeat, RankFiles
from drumline.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("survival")]

STEPS, INTERVAL = 30, 5


def recipe(folder: Path, **sections: Any) -> str:
    """Thirty quick steps on two ranks, saved every five, evaluated every ten."""
    defaults: dict[str, Any] = {
        "duration": {"steps": STEPS},
        "batch": {"effective": 24, "per_device": 4, "gpus": 2},
        "evaluation": {"every_steps": 10, "per_device": 200},
        "checkpoint": {"every_steps": INTERVAL, "keep_last": 3},
        "launch": {"max_restarts": 3, "hang_timeout_s": 60.0},
        "logging": {"every_steps": 1},
    }
    for name, values in sections.items():
        is_section = isinstance(values, dict)
        defaults[name] = {**defaults.get(name, {}), **values} if is_section else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(yaml12.dump(tiny_recipe(**defaults)))
    return "r.yaml"


def run(
    fork_server: ForkServer, folder: Path, faults: Any = None, **sections: Any
) -> tuple[int, Child]:
    """`drumline run` to its end; the run folder is `r`."""
    child = fork_server.drumline(
        folder, "run", recipe(folder, **sections), "--run-dir", "r", "--json", faults=faults
    )
    return child.wait(), child


def stop_at(step: int, place: str) -> dict[str, Any]:
    """SIGTERM to rank 0 of the first attempt."""
    return {
        "what": "signal",
        "rank": 0,
        "attempt": 0,
        "step": step,
        "phase": place,
        "signal": signal.SIGTERM,
    }


def step_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "lr" in line]


def attempts(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "record.json").read_text())["attempts"]  # type: ignore[no-any-return]


def ranks_of(folder: Path) -> list[Process]:
    found = [Process.parse(path.read_text()) for path in folder.glob("logs/attempt-*/rank-*.pid")]
    return [process for process in found if process]


def assert_same_training(ours: Path, reference: Path, step: int = STEPS) -> None:
    """Weights, optimizer and state equal to the last bit; every step told once, with the same numbers."""
    final = f"checkpoints/step-{step:08d}"
    for name in sorted(path.name for path in (reference / final).glob("rank-*.json")):
        mine, theirs = (
            folder / f"checkpoints/step-{step:08d}" / name for folder in (ours, reference)
        )
        assert mine.read_bytes() == theirs.read_bytes(), name
    assert verify(ours / final) == verify(reference / final)
    keys = ("step", "loss", "lr", "grad_norm", "digest", "samples", "skipped")
    numbers = [
        [tuple(line[key] for key in keys) for line in step_lines(folder)]
        for folder in (ours, reference)
    ]
    assert [line[0] for line in numbers[0]] == list(range(1, step + 1))
    assert numbers[0] == numbers[1]
    evaluations = [
        [line for line in read_metrics(folder / "metrics.jsonl") if "eval/loss" in line]
        for folder in (ours, reference)
    ]
    assert evaluations[0] == evaluations[1]
    assert not any(process.is_alive for process in ranks_of(ours))


@pytest.fixture(scope="module")
def straight(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    code, child = run(fork_server, folder)
    assert code == 0, child.err
    assert [a["outcome"] for a in attempts(folder / "r")] == ["finished"]
    return folder / "r"


@pytest.mark.parametrize("seed", range(10))
def test_crash_replay(fork_server: ForkServer, straight: Path, tmp_path: Path, seed: int) -> None:
    """Up to three SIGKILLs of a random rank at random places: bitwise the undisturbed run."""
    draw = random.Random(seed)
    synchronous = seed % 2 == 1
    kills = draw.randint(1, 3)
    faults = [
        {"what": "kill", "rank": draw.randint(0, 1), "attempt": attempt, "count": draw.randint(4, 120),
         "delay_s": draw.choice([0, 0.001, 0.004])}
        for attempt in range(kills)
    ]  # fmt: skip
    code, child = run(fork_server, tmp_path, faults, launch={"max_restarts": 9, "hang_timeout_s": 60.0},
                      checkpoint={"every_steps": INTERVAL, "keep_last": 3, "async": not synchronous})  # fmt: skip
    told = attempts(tmp_path / "r")
    if (
        code == 4 and "no progress" in child.err
    ):  # two kills at the same step, as a person would see it
        again = fork_server.drumline(tmp_path, "resume", "r")
        assert again.wait() == 0, again.err
    else:
        assert code == 0, child.err
    assert_same_training(tmp_path / "r", straight)
    assert told[0]["outcome"] == "failed"
    for attempt in told[:-1]:
        log = (tmp_path / f"r/logs/attempt-{attempt['number'] + 1}/rank-0.log").read_text()
        from_step = (
            int(log.split("going on from step ")[1].split(",")[0]) if "going on" in log else 0
        )
        # A save under way when a rank is killed counts for nothing, and it waits for the one before.
        assert attempt["step"] - from_step <= (INTERVAL if synchronous else 2 * INTERVAL)


@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_killed_and_resumed_it_is_bitwise_equal(
    fork_server: ForkServer, tmp_path: Path, gpus: int
) -> None:
    """Everything killed after step 10, resumed by hand: a model of several DDP buckets, to the last bit."""
    model = {"factory": "slow_models:slow",
             "config": {"features": 32, "hidden": 300, "classes": 10, "wait_s": 0.0}}  # fmt: skip
    sections = {"model": model, "project": str(ROOT / "tests/distributed"), "duration": {"steps": 20},
                "batch": {"effective": 24, "per_device": 2, "gpus": gpus},
                "checkpoint": {"every_steps": 10, "async": False}}  # fmt: skip
    code, child = run(fork_server, tmp_path / "straight", **sections)
    assert code == 0, child.err
    where = {"rank": gpus - 1, "attempt": 0, "step": 13, "phase": "backward"}
    faults = [{"what": "kill the command", **where}, {"what": "sleep", **where}]
    code, _ = run(fork_server, tmp_path / "killed", faults, **sections)
    assert code == -signal.SIGKILL
    resumed = fork_server.drumline(tmp_path / "killed", "resume", "r")
    assert resumed.wait() == 0, resumed.err
    log = (tmp_path / "killed/r/logs/attempt-1/rank-0.log").read_text()
    assert "going on from step 10" in log
    assert_same_training(tmp_path / "killed/r", tmp_path / "straight/r", 20)


WHO = ("the command", "one rank", "all")


@pytest.mark.parametrize("seed", range(20))
def test_preemption(fork_server: ForkServer, straight: Path, tmp_path: Path, seed: int) -> None:
    """A signal at a random moment to the command, a rank or all: one checkpoint, 75, resume bitwise."""
    draw = random.Random(100 + seed)
    who = WHO[seed % 3]
    fault: dict[str, Any] = {
        "attempt": 0, "count": draw.randint(1, 150), "delay_s": draw.choice([0, 0.001, 0.003]),
        "signal": draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]),
    }  # fmt: skip
    rank = draw.randint(0, 1)
    kinds = {"the command": [("signal the command", rank)], "one rank": [("signal", rank)],
             "all": [("signal", 0), ("signal", 1), ("signal the command", 0)]}  # fmt: skip
    faults = [{**fault, "what": what, "rank": rank} for what, rank in kinds[who]]
    code, child = run(fork_server, tmp_path, faults)
    assert code == 75, (code, child.err)
    facts = json.loads(child.out)
    saved = find_checkpoints(tmp_path / "r/checkpoints")
    assert step_of(saved[-1]) == facts["steps"] == step_lines(tmp_path / "r")[-1]["step"]
    assert len(saved) <= 3
    assert not any(process.is_alive for process in ranks_of(tmp_path / "r"))
    resumed = fork_server.drumline(tmp_path, "resume", "r")
    assert resumed.wait() == 0, resumed.err
    assert_same_training(tmp_path / "r", straight)


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("place", ["save", "evaluation", "warm-up", "forward"])
def test_signals_at_named_places(
    fork_server: ForkServer, straight: Path, tmp_path: Path, place: str
) -> None:
    """During a save, an evaluation, the warm-up or a step; an evaluation is left and done again."""
    step = {"warm-up": 0, "forward": 7}.get(place, 10)
    fault = {
        "what": "signal",
        "rank": 1,
        "attempt": 0,
        "step": step,
        "phase": place,
        "signal": signal.SIGTERM,
    }
    code, child = run(fork_server, tmp_path, [fault])
    assert code == 75, child.err
    steps = {"save": 11, "evaluation": 10, "warm-up": 1, "forward": 7}[place]
    assert json.loads(child.out)["steps"] == steps
    if place == "evaluation":
        assert not [
            line for line in read_metrics(tmp_path / "r/metrics.jsonl") if "eval/loss" in line
        ]
    resumed = fork_server.drumline(tmp_path, "resume", "r")
    assert resumed.wait() == 0, resumed.err
    assert_same_training(tmp_path / "r", straight)


def test_a_second_ctrl_c_leaves_at_once(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """Two SIGINTs while a rank sleeps: 130 within seconds, the older checkpoints sound, resume bitwise."""
    sleep = {"what": "sleep", "rank": 0, "attempt": 0, "step": 13, "phase": "forward"}
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path), "--run-dir", "r", faults=[sleep]
    )
    wait_for(lambda: (tmp_path / "r/checkpoints/step-00000010").exists())
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.4)
    assert child.is_running()
    started = time.monotonic()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    assert time.monotonic() - started < 5
    assert not any(process.is_alive for process in ranks_of(tmp_path / "r"))
    assert verify(tmp_path / "r/checkpoints/step-00000010").step == 10
    resumed = fork_server.drumline(tmp_path, "resume", "r")
    assert resumed.wait() == 0, resumed.err
    assert_same_training(tmp_path / "r", straight)


def test_ranks_end_with_a_killed_supervisor(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command: its ranks are gone within seconds; doctor and resume know what it was."""
    fault = {"what": "kill the command", "rank": 0, "attempt": 0, "step": 13, "phase": "forward"}
    sleep = {"what": "sleep", "rank": 0, "attempt": 0, "step": 13, "phase": "backward"}
    code, _ = run(fork_server, tmp_path, [fault, sleep])
    assert code == -signal.SIGKILL
    ranks = ranks_of(tmp_path / "r")
    assert len(ranks) == 2
    wait_for(lambda: not any(process.is_alive for process in ranks), 5)
    doctor = fork_server.drumline(tmp_path, "doctor", "r", "--json")
    assert doctor.wait() == 0
    health = json.loads(doctor.out)
    assert health["state"] == "interrupted"
    assert health["sound"][-1] == "step-00000010"
    assert "drumline resume r goes on from step-00000010" in health["next"]
    resumed = fork_server.drumline(tmp_path, "resume", "r")
    assert resumed.wait() == 0, resumed.err
    assert_same_training(tmp_path / "r", straight)
    assert [(a["outcome"], a["kind"]) for a in attempts(tmp_path / "r")] == [
        ("failed", "lost"),
        ("finished", "finished"),
    ]


@pytest.mark.parametrize(("place", "step"), [("warm-up", 0), ("forward", 7)])
def test_out_of_memory_goes_on_with_smaller_micro_batches(
    fork_server: ForkServer, straight: Path, tmp_path: Path, place: str, step: int
) -> None:
    """One rank of two runs out: 4 × 3 becomes 3 × 4, 2 × 6; the same samples, losses within 1e-6."""
    fault = {
        "what": "out of memory",
        "rank": 1,
        "step": step,
        "phase": place,
        "per_device_above": 2,
    }
    code, child = run(fork_server, tmp_path, [fault], launch={"max_restarts": 0, "hang_timeout_s": 60.0},
                      checkpoint={"every_steps": 3})  # fmt: skip
    assert code == 0, child.err
    told = attempts(tmp_path / "r")
    assert [(a["split"]["per_device"], a["split"]["accumulation"]) for a in told] == [
        (4, 3),
        (3, 4),
        (2, 6),
    ]
    assert [a["kind"] for a in told] == ["OutOfMemory", "OutOfMemory", "finished"]
    assert told[0]["step"] == (0 if step == 0 else 6)
    assert "out of memory: rank 1" in told[1]["cause"]
    assert "4 per_device × 2 gpus × 3 accumulation becomes 3 per_device × 2 gpus × 4" in child.err
    ours, theirs = step_lines(tmp_path / "r"), step_lines(straight)
    assert [line["digest"] for line in ours] == [line["digest"] for line in theirs]
    for mine, reference in zip(ours, theirs, strict=True):
        assert abs(mine["loss"] - reference["loss"]) < 1e-6 * reference["loss"]


def test_out_of_memory_at_per_device_1_fails_with_advice(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """Nothing is left to divide: exit 4, in words that help; a resume begins at the smallest split."""
    fault = {"what": "out of memory", "rank": 0, "step": 2, "phase": "forward"}
    code, child = run(fork_server, tmp_path, [fault], batch={"effective": 4, "per_device": 2},
                      evaluation={"every_steps": 10, "per_device": 1})  # fmt: skip
    assert code == 4
    assert "can't allocate memory" in child.err
    assert "batch.per_device is 1 already" in child.err
    assert [a["split"]["per_device"] for a in attempts(tmp_path / "r")] == [2, 1]
    refused = fork_server.run(tmp_path, "resume", "r")
    assert refused.returncode == 4
    assert "it reached step 1 and saved no checkpoint" in refused.stderr
    first = (tmp_path / "r/metrics.jsonl").read_bytes()
    resumed = fork_server.run(tmp_path, "resume", "r", "--from-scratch")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "r/metrics.jsonl.before-1").read_bytes() == first
    assert [a["split"]["per_device"] for a in attempts(tmp_path / "r")] == [2, 1, 1]


def test_a_nan_on_one_rank_is_skipped_by_all(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """Told with rank and samples, counted, no update anywhere; the ranks stay identical."""
    code, child = run(fork_server, tmp_path, [{"what": "nan", "rank": 1, "step": 12}])
    assert code == 0, child.err
    lines = step_lines(tmp_path / "r")
    assert [line["step"] for line in lines if line["skipped"]] == [12]
    odd = lines[11]
    assert (odd["loss"], odd["why"], odd["ranks"]) == (None, "loss not finite", [1])
    assert len(odd["indices"]) == 4
    assert odd["digest"] == step_lines(straight)[11]["digest"]
    assert "step 12: loss not finite on rank 1; skipped" in child.err
    final = tmp_path / "r/checkpoints/step-00000030"
    assert json.loads((final / "state.json").read_text())["skipped_steps"] == [12]
    weights = json.loads((final / "rank-0.json").read_text())["tensors"]
    steps_taken = next(name for name in weights if name.endswith(".step"))
    before = json.loads((straight / "checkpoints/step-00000030/rank-0.json").read_text())["tensors"]
    assert weights[steps_taken]["sha256"] != before[steps_taken]["sha256"]
    assert [line["loss"] for line in lines[:11]] == [
        line["loss"] for line in step_lines(straight)[:11]
    ]
    assert all(line["loss"] for line in lines[12:])


def test_too_many_skips_end_the_run_without_a_restart(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """A set number in a row: exit 4, one attempt, and the metrics that name the samples are there."""
    poison = [{"what": "nan", "rank": 0, "step": step} for step in range(7, 12)]
    code, child = run(fork_server, tmp_path, poison, anomalies={"max_skipped": 4})
    assert code == 4
    assert "step 10: 4 steps in a row were skipped (anomalies.max_skipped 4)" in child.err
    assert [a["kind"] for a in attempts(tmp_path / "r")] == ["NotFinite"]
    assert [line["step"] for line in step_lines(tmp_path / "r") if line["skipped"]] == [7, 8, 9, 10]


def test_not_finite_after_a_load_falls_back(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """Non-finite from the first step after a load: that checkpoint is set aside, the one before used."""
    stop = stop_at(13, "forward")
    poison = [{"what": "nan", "rank": 1, "attempt": 1, "step": step} for step in (14, 15, 16)]
    code, _ = run(fork_server, tmp_path, [stop])
    assert code == 75
    resumed = fork_server.drumline(tmp_path, "resume", "r", faults=poison)
    assert resumed.wait() == 0, resumed.err
    told = attempts(tmp_path / "r")
    assert [a["kind"] for a in told] == ["stopped", "NotFiniteAfterLoad", "finished"]
    assert "kept as step-00000013.bad-1, step-00000015.bad-1, falling back" in told[2]["cause"]
    assert "going on from step-00000010" in resumed.err
    assert_same_training(tmp_path / "r", straight)


def test_a_thousand_clean_steps_have_no_false_skip(fork_server: ForkServer, tmp_path: Path) -> None:
    """Nothing is skipped, and nothing is called not finite."""
    code, child = run(fork_server, tmp_path, duration={"steps": 1000}, logging={"every_steps": 100},
                      checkpoint={"every_steps": None}, evaluation={"every_steps": 500})  # fmt: skip
    assert code == 0, child.err
    lines = step_lines(tmp_path / "r")
    assert len(lines) == 1000
    assert not any(line["skipped"] for line in lines)
    assert {line.get("why") for line in lines} <= {None, "spike"}


def test_a_sleeping_rank_is_found_and_the_run_finishes(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """Within twice the timeout; the late rank is named, both stacks are in the logs, bitwise."""
    sleep = {"what": "sleep", "rank": 1, "attempt": 0, "step": 12, "phase": "forward"}
    code, child = run(
        fork_server, tmp_path, [sleep], launch={"max_restarts": 1, "hang_timeout_s": 5.0}
    )
    assert code == 0, child.err
    assert "hang: rank 1 (step 12, forward of micro-batch 1 of 3) did not move for 5 s" in child.err
    told = attempts(tmp_path / "r")
    assert [a["kind"] for a in told] == ["hang", "finished"]
    for rank, words in ((0, "backward"), (1, "_strike")):
        log = (tmp_path / f"r/logs/attempt-0/rank-{rank}.log").read_text()
        assert "most recent call first" in log
        recorded = json.loads(
            (tmp_path / f"r/logs/attempt-0/rank-{rank}.collectives.json").read_text()
        )
        assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")
        assert words in log
    slept = (
        os.stat(tmp_path / "r/logs/attempt-0/ended").st_mtime
        - os.stat(tmp_path / "r/logs/attempt-0/rank-1.heartbeat").st_mtime
    )
    assert 5.0 <= slept < 10.0
    assert_same_training(tmp_path / "r", straight)


def test_ranks_that_nobody_watches_leave_by_themselves(
    fork_server: ForkServer, straight: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A frozen supervisor, a rank stuck in C with Python's lock: stacks, no rank left; thawed, it goes on."""
    freeze = {"what": "signal the command", "rank": 1, "attempt": 0, "step": 12, "phase": "forward",
              "signal": signal.SIGSTOP}  # fmt: skip
    stuck = {"what": "sleep with the lock", "rank": 1, "attempt": 0, "step": 12, "phase": "forward"}
    slow = {"what": "sleep", "seconds": 1.0, "rank": 1, "attempt": 0, "step": 11, "phase": "begin"}
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path, launch={"max_restarts": 1, "hang_timeout_s": 7.0}),
        "--run-dir", "r", "--json", faults=[slow, freeze, stuck],
    )  # fmt: skip
    request.addfinalizer(child.end)
    logs = tmp_path / "r/logs/attempt-0"
    deadline = time.monotonic() + 60
    while not (found := ranks_of(tmp_path / "r")) or any(process.is_alive for process in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (logs / "ended").exists()
    told = [(logs / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "Timeout (0:00:14)!" in told[1]
    assert "_strike" in told[1].partition("Timeout")[2]
    assert re.search(
        "not moved for 1[01] s: step 12, backward(.|\n)*most recent call first", told[0]
    )
    assert (logs / "rank-0.collectives.json").exists()
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait() == 0, child.err
    assert [a["kind"] for a in attempts(tmp_path / "r")] == ["lost", "finished"]
    assert_same_training(tmp_path / "r", straight)


def test_a_run_here_can_be_followed_and_cancelled(
    fork_server: ForkServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`logs` shows its metrics, `cancel` stops it, also where a scheduler has forgotten the job of its record."""
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path, duration={"steps": 100_000}), "--run-dir", "r"
    )
    request.addfinalizer(child.end)
    deadline = time.monotonic() + 60
    while not step_lines(tmp_path / "r"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    record = json.loads((tmp_path / "r/record.json").read_text())
    record["jobs"] = [{"target": "kubernetes", "id": "job/gone", "namespace": "a"}]
    (tmp_path / "r/record.json").write_text(json.dumps(record))
    told = fork_server.drumline(tmp_path, "logs", "r")
    assert told.wait() == 0
    assert '"loss"' in told.out
    cancelled = fork_server.drumline(tmp_path, "cancel", "r")
    assert cancelled.wait() == 0, cancelled.err
    assert cancelled.out == "asked to save and stop\n"
    assert child.wait() == 75


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of this size, as root only."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


LARGE = {"config": {"features": 32, "hidden": 300, "classes": 10}}


def test_a_full_disk_stops_the_run_and_spares_what_is_saved(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """on_error stop: both ranks say the same at once, exit 4, no restart; room made, resume finishes."""
    with small_disk(tmp_path / "small", "3500k"):
        started = time.monotonic()
        code, child = run(fork_server, tmp_path / "small", model=LARGE)
        assert code == 4, child.err
        assert time.monotonic() - started < 20
        run_folder = tmp_path / "small/r"
        assert "No space left on device" in child.err
        (told,) = attempts(run_folder)
        assert told.get("kind") == "CheckpointError", child.err
        outcomes = [
            json.loads((run_folder / f"logs/attempt-0/rank-{r}.outcome.json").read_text())
            for r in (0, 1)
        ]
        assert outcomes[0]["message"] == outcomes[1]["message"]
        assert abs(outcomes[0]["when"] - outcomes[1]["when"]) < 10
        saved = find_checkpoints(run_folder / "checkpoints")
        assert len(saved) >= 2
        for path in saved:
            assert verify(path).step == step_of(path)
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path / "small")], check=True)
        resumed = fork_server.drumline(tmp_path / "small", "resume", "r")
        assert resumed.wait() == 0, resumed.err
        assert [line["step"] for line in step_lines(run_folder)] == list(range(1, STEPS + 1))


def test_a_full_disk_can_be_lived_through(fork_server: ForkServer, tmp_path: Path) -> None:
    """on_error continue: a save and the metrics fail for a while, are told, and nothing is missing."""
    small = tmp_path / "small"
    with small_disk(small, "12m"):
        child = fork_server.drumline(
            small, "run",
            recipe(small, model=LARGE, duration={"steps": 200}, evaluation={"every_steps": 200},
                   checkpoint={"every_steps": 20, "keep_last": 2, "on_error": "continue"}),
            "--run-dir", "r", "--json",
        )  # fmt: skip
        wait_for(lambda: (small / "r/checkpoints/step-00000020").exists())
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        wait_for(lambda: "No space left" in (small / "r/logs/attempt-0/rank-1.log").read_text())
        (small / "filler").unlink()
        assert child.wait() == 0, child.err
        lines = read_metrics(small / "r/metrics.jsonl")
        assert [line["step"] for line in lines if "lr" in line] == list(range(1, 201))
        errors = [line["checkpoint/error"] for line in lines if "checkpoint/error" in line]
        assert errors
        assert "No space left" in errors[0]
        assert verify(small / "r/checkpoints/step-00000200").step == 200
        assert not list((small / "r/checkpoints").glob(".*"))


def test_a_disk_without_permission_is_every_ranks_error(tmp_path: Path) -> None:
    """Read-only under the run: all ranks say the same, within seconds, and the older one stays sound."""
    with small_disk(tmp_path / "small", "1m"):
        save(tmp_path / "small", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "small")], check=True)
        started = time.monotonic()
        errors = {str(error) for error in try_to_save(tmp_path / "small", 2)}
        assert time.monotonic() - started < 10
        (words,) = errors
        assert words.endswith("cannot write: Read-only file system")
        assert [verify(path).step for path in find_checkpoints(tmp_path / "small")] == [1]


def test_a_full_disk_does_not_silence_a_rank(tmp_path: Path) -> None:
    """The room for a rank's last words is taken when it starts; its heartbeats need no more either."""
    with small_disk(tmp_path / "small", "256k"):
        files = RankFiles(tmp_path / "small", 0)
        assert files.announce()
        heartbeats = files.open_heartbeat()
        heartbeats.enter(Heartbeat(step=1, phase=Phase.STEP_BEGINS))
        with (
            (tmp_path / "small/filler").open("wb", buffering=0) as filler,
            contextlib.suppress(OSError),
        ):
            while True:
                filler.write(b"x" * 4096)
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "small/more").write_bytes(b"x" * 4096)
        heartbeats.enter(Heartbeat(step=1, phase=Phase.FORWARD, detail="micro-batch 1 of 1"))
        heartbeats.sync()
        files.write_outcome({"outcome": "failed", "message": "x" * 4000})
        assert files.outcome() == {"outcome": "failed", "message": "x" * 4000}
        found = files.heartbeat()
        assert found
        assert found.words == "forward of micro-batch 1 of 1"


def test_a_full_disk_in_prepare(fork_server: ForkServer, tmp_path: Path) -> None:
    """One message, exit 2, nothing left behind; another DRUMLINE_CACHE, as it says, takes them."""
    with small_disk(tmp_path / "small", "300k"):
        env_before = os.environ["DRUMLINE_CACHE"]
        os.environ["DRUMLINE_CACHE"] = str(tmp_path / "small/cache")
        try:
            child = fork_server.drumline(tmp_path, "prepare", "tiny-code-lm")
        finally:
            os.environ["DRUMLINE_CACHE"] = env_before
        assert child.wait() == 2
        heard("cannot write the prepared rows: No space left on device", child.err)
        assert fork_server.drumline(tmp_path, "prepare", "tiny-code-lm").wait() == 0
        assert "Traceback" not in child.err + child.out
        assert not [path for path in (tmp_path / "small").rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_in_prepare(
    fork_server: ForkServer, tmp_path: Path, number: signal.Signals
) -> None:
    """Exit 128 + the signal; nothing half-written stays."""
    env_before = os.environ["DRUMLINE_CACHE"]
    os.environ["DRUMLINE_CACHE"] = str(tmp_path / "cache")
    try:
        child = fork_server.drumline(tmp_path, "prepare", "tiny-code-lm")
    finally:
        os.environ["DRUMLINE_CACHE"] = env_before
    wait_for(lambda: list(tmp_path.glob("cache/data/.*")))
    os.kill(child.pid, number)
    assert child.wait() == 128 + number
    assert "interrupted" in child.err
    assert "Traceback" not in child.err
    assert not list((tmp_path / "cache/data").iterdir())


def test_what_lies_half_written_is_mended(
    fork_server: ForkServer, straight: Path, tmp_path: Path
) -> None:
    """A torn last metrics line, a damaged newest checkpoint, an abandoned save: told, mended, bitwise."""
    stop = {
        "what": "signal",
        "rank": 0,
        "step": 23,
        "phase": "forward",
        "signal": signal.SIGTERM,
        "attempt": 0,
    }
    code, _ = run(fork_server, tmp_path, [stop])
    assert code == 75
    folder = tmp_path / "r"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "loss": 2.')
    damaged = folder / "checkpoints/step-00000023/rank-1.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(bytes(raw))
    shutil.copytree(damaged.parent, folder / "checkpoints/.step-00000025.tmp")
    doctor = fork_server.drumline(tmp_path, "doctor", "r")
    assert doctor.wait() == 0
    assert "step-00000023/rank-1.safetensors: tensor" in doctor.out
    assert "its last line is torn" in doctor.out
    assert "drumline resume r goes on from step-00000020" in doctor.out
    resumed = fork_server.drumline(tmp_path, "resume", "r")
    assert resumed.wait() == 0, resumed.err
    assert (folder / "checkpoints/step-00000023.bad-1").is_dir()
    log = (folder / "logs/attempt-1/rank-0.log").read_text()
    assert "kept as step-00000023.bad-1, falling back to the one before" in log
    assert_same_training(folder, straight)


def test_doctor_on_every_state(fork_server: ForkServer, straight: Path, tmp_path: Path) -> None:
    """Finished, never started, running, failed: each with what to do next."""

    def ask(folder: Path) -> dict[str, Any]:
        doctor = fork_server.drumline(tmp_path, "doctor", str(folder), "--json")
        assert doctor.wait() == 0, doctor.err
        return json.loads(doctor.out)  # type: ignore[no-any-return]

    assert ask(straight)["state"] == "finished"
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert ask(tmp_path / "empty")["state"] == "never started"
    sleep = {"what": "sleep", "rank": 0, "step": 3, "phase": "begin", "seconds": 3}
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path), "--run-dir", "r", faults=[sleep]
    )
    wait_for(lambda: (tmp_path / "r/metrics.jsonl").exists())
    assert ask(tmp_path / "r")["state"] == "running"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75
    assert ask(tmp_path / "r")["state"] == "stopped"
    raised = [{"what": "raise", "rank": 0, "step": 6, "phase": "forward"}]
    code, child = run(fork_server, tmp_path / "f", raised)
    assert code == 4
    assert "no progress since step 5: rank 0: ValueError: planted" in child.err
    health = ask(tmp_path / "f/r")
    assert (health["state"], health["sound"]) == ("failed", ["step-00000005"])
    assert "planted" in health["message"]


BUMPY = {
    "optimizer": {"name": "adamw", "lr": 0.3},
    "evaluation": {"every_steps": 5, "per_device": 200},
    "checkpoint": {"every_steps": 5, "keep_last": 1, "keep_best": 2},
}
"""A loss that goes up and down, so that which checkpoint is the best is no matter of course."""


@pytest.fixture(scope="module")
def bumpy(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run with it."""
    folder = tmp_path_factory.mktemp("bumpy")
    code, child = run(fork_server, folder, **BUMPY)
    assert code == 0, child.err
    return folder / "r"


@pytest.mark.parametrize("step", [5, 15, 20, 30])
def test_an_evaluation_made_up_for_counts_as_if_it_had_not_been_left(
    fork_server: ForkServer, bumpy: Path, tmp_path: Path, step: int
) -> None:
    """Signalled in it, then killed after it was done again: the same best, the same end, told once."""
    stop = stop_at(step, "evaluation")
    kill = {"what": "kill", "rank": 1, "attempt": 1, "step": step + 1, "phase": "backward"}
    code, child = run(fork_server, tmp_path, [stop], **BUMPY)
    assert (code, json.loads(child.out)["steps"]) == (75, step)
    resumed = fork_server.drumline(tmp_path, "resume", "r", "--json", faults=[kill])
    assert resumed.wait() == 0, resumed.err
    assert_same_training(tmp_path / "r", bumpy)
    kept = [[p.name for p in find_checkpoints(f / "checkpoints")] for f in (tmp_path / "r", bumpy)]
    assert kept[0] == kept[1]
    assert json.loads(resumed.out)["eval"]["eval/loss"] is not None


def test_early_stopping_is_not_forgotten(fork_server: ForkServer, tmp_path: Path) -> None:
    """A rank dies right after the last checkpoint of a run that stopped early: it stays stopped."""
    rule = {"early_stopping": {"metric": "eval/loss", "patience": 1, "min_delta": 5.0}}
    code, child = run(fork_server, tmp_path / "a", **BUMPY, **rule)
    assert code == 0, child.err
    facts = json.loads(child.out)
    assert facts["steps"] == 10
    kill = {"what": "kill", "rank": 1, "attempt": 0, "step": 10, "phase": "save", "delay_s": 0.3}
    late = {"what": "sleep", "rank": 0, "attempt": 0, "step": 10, "phase": "left", "seconds": 1}
    code, child = run(fork_server, tmp_path / "b", [kill, late], **BUMPY, **rule)
    assert code == 0, child.err
    again = json.loads(child.out)
    assert {**again, "run": 0, "seconds": 0} == {**facts, "run": 0, "seconds": 0}


def test_a_reader_that_leaves_does_not_end_the_training(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """stderr is a pipe that nobody reads any more: the run goes on to its end, and its record too."""
    reading, writing = os.pipe()
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path), "--run-dir", "r", "--json", err=writing
    )
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert child.wait() == 0
    assert json.loads(child.out)["steps"] == STEPS
    assert [a["outcome"] for a in attempts(tmp_path / "r")] == ["finished"]


def test_where_nothing_sound_is_left_nothing_is_begun_anew(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """Every checkpoint damaged, or their folder gone: exit 4, named, and the metrics stay."""
    stop = stop_at(13, "forward")
    code, _ = run(fork_server, tmp_path, [stop])
    assert code == 75
    folder = tmp_path / "r"
    shutil.move(folder / "checkpoints", tmp_path / "kept")
    before = (folder / "metrics.jsonl").read_bytes()

    def refused(words: str, *options: str) -> None:
        resumed = fork_server.run(tmp_path, "resume", "r", *options)
        assert resumed.returncode in (2, 4), resumed.stderr
        assert words in resumed.stderr
        assert (folder / "metrics.jsonl").read_bytes() == before

    refused("checkpoints: it is gone")
    (folder / "checkpoints").mkdir()
    refused("it is empty, and metrics.jsonl says that step 13 was saved")
    (folder / "checkpoints").rmdir()
    shutil.move(tmp_path / "kept", folder / "checkpoints")
    refused("it has step-00000013", "--from-scratch")
    for path in folder.glob("checkpoints/step-*/rank-0.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        refused("no checkpoint is sound; they are kept as step-000000")
    health = json.loads(fork_server.run(tmp_path, "doctor", "r", "--json").stdout)
    assert "drumline resume --from-scratch" in health["next"]
    anew = fork_server.run(tmp_path, "resume", "r", "--from-scratch")
    assert anew.returncode == 0, anew.stderr
    assert (
        "begins again at step 1; what it had is kept as checkpoints.before-1, metrics.jsonl.before-1"
        in anew.stderr
    )
    assert (folder / "metrics.jsonl.before-1").read_bytes() == before
    assert (folder / "checkpoints.before-1/step-00000013.bad-1").is_dir()
    assert told_steps(folder) == list(range(1, STEPS + 1))


def told_steps(folder: Path) -> list[int]:
    """The steps of a run's metrics, in order."""
    return [
        line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"
    ]


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"attempts": null}', "{", ""])
def test_a_record_that_is_none_is_told(fork_server: ForkServer, tmp_path: Path, text: str) -> None:
    """doctor and resume: one line, exit 4, no traceback."""
    (tmp_path / "r/checkpoints").mkdir(parents=True)
    (tmp_path / "r/record.json").write_text(text)
    for command in ("doctor", "resume"):
        child = fork_server.drumline(tmp_path, command, "r")
        assert child.wait() == 4, child.err
        assert "r/record.json: " in child.err
        assert "Traceback" not in child.err
