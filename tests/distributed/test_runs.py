"""Whole runs: trained, stopped, killed, resumed at another split.

What a launcher has a part in goes through the real torchrun; the rest is forked (fork_server.py).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import Child, ForkServer

from conftest import ROOT, SOURCES, tiny_recipe
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

TEXT_RUN = [
    "duration.steps=16", "schedule.warmup_steps=2", "evaluation.every_steps=8", "checkpoint.every_steps=8",
    "logging.every_steps=1", "batch.effective=12", "batch.per_device=3", "data.options={max_files: 40}",
    "data.validation=0.05",
]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in the background, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "drumline.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": SOURCES},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until(condition: Any, child: Child, seconds: float = 120) -> None:
    """The same for a forked command."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.is_running(), child.err
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rank_pids(run: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in run.glob("logs/attempt-*/rank-*.pid")]


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen steps of real text on two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, "run", "tiny-code-lm", *TEXT_RUN, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert facts["outcome"] == "finished"
    assert facts["steps"] == 16
    assert facts["eval"]["eval/loss"] < 5.5
    assert "step 16/16" in err
    assert "next  drumline plan runs/tiny-code-lm-1 --gpus 4" in err
    return Path(facts["run"])


def test_stopped_and_resumed_at_another_split_it_comes_out_the_same(
    straight: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """SIGTERM on two ranks: exit 75 and a checkpoint; resumed on one: the losses of the straight run."""
    process = start(tmp_path, "run", "tiny-code-lm", *TEXT_RUN, "--run-dir", "r", "--json")
    run = tmp_path / "r"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps(run)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    stopped = json.loads(out)
    assert stopped["outcome"] == "stopped"
    assert 3 <= stopped["steps"] < 16
    assert "next  drumline resume r" in err
    assert_gone(rank_pids(run))
    resumed = fork_server.run(tmp_path, "resume", "r", "--gpus", "1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert "12 = 3 per_device × 1 gpus × 4 accumulation" in resumed.stderr
    ours, reference = steps(run), steps(straight)
    assert [line["step"] for line in ours] == list(range(1, 17))
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-6 * theirs["loss"]
        assert (mine["digest"], mine["lr"]) == (theirs["digest"], theirs["lr"])
    record = json.loads((run / "record.json").read_text())
    for attempt in record["attempts"]:  # a CPU has no real peaks to put beside the prediction
        assert attempt["memory"]["predicted"]["device_high"] > 0
        assert attempt["memory"]["measured"] is None
    assert [(a["cause"], a["outcome"], a["split"]["gpus"]) for a in record["attempts"]] == [
        ("start", "stopped", 2),
        ("resume", "finished", 1),
    ]
    again = fork_server.run(tmp_path, "resume", "r")
    assert again.returncode == 2
    assert "this run is finished" in again.stderr


def slow_recipe(folder: Path, gpus: int) -> str:
    recipe = tiny_recipe(
        project=str(ROOT / "tests/distributed"),
        model={"factory": "slow_models:slow",
               "config": {"features": 32, "hidden": 300, "classes": 10, "wait_s": 0.04}},
        batch={"effective": 24, "per_device": 2, "gpus": gpus},
        schedule={"name": "linear", "warmup_steps": 3},
        checkpoint={"every_steps": 10},
        launch={"max_restarts": 0},
        logging={"every_steps": 1},
    )  # fmt: skip
    path = folder / "slow.yaml"
    path.write_text(yaml12.dump(recipe))
    return str(path)


def test_six_kills_around_saves_change_nothing(tmp_path: Path, fork_server: ForkServer) -> None:
    """A rank is killed six times while a save is under way: restarted, and bitwise the straight run."""
    recipe = slow_recipe(tmp_path, 2)
    quick = ["model.config.wait_s=0.02", "checkpoint.every_steps=2", "launch.max_restarts=9"]
    done = fork_server.run(tmp_path, "run", recipe, *quick, "--run-dir", "straight")
    assert done.returncode == 0, done.stderr
    child = fork_server.drumline(tmp_path, "run", recipe, *quick, "--run-dir", "r", "--json")
    run = tmp_path / "r"
    draw = random.Random(7)
    for kill in range(6):
        attempt = run / f"logs/attempt-{kill}"
        wait_until((attempt / "rank-1.pid").exists, child)
        step = 4 + 2 * kill
        wait_until(lambda step=step: list(run.glob(f"checkpoints/*step-{step:08d}*")), child)
        time.sleep(draw.choice([0, 0.002, 0.01, 0.05]))
        rank = draw.randrange(2)
        os.kill(int((attempt / f"rank-{rank}.pid").read_text().split()[0]), signal.SIGKILL)
    assert child.wait(120) == 0, child.err
    assert json.loads(child.out)["steps"] == 20
    attempts = json.loads((run / "record.json").read_text())["attempts"]
    assert [a["kind"] for a in attempts] == ["lost"] * 6 + ["finished"]
    assert [line["step"] for line in steps(run)] == list(range(1, 21))
    for name in ("rank-0.json", "rank-1.json", "state.json"):
        ours, reference = (
            tmp_path / f / "checkpoints/step-00000020" / name for f in ("r", "straight")
        )
        assert ours.read_bytes() == reference.read_bytes()


def test_the_same_step_failing_twice_ends_the_run(tmp_path: Path, fork_server: ForkServer) -> None:
    """A model that raises at its n-th forward: the message names the last finished step."""
    code = (
        "import torch\nfrom torch import nn\n"
        "class M(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        self.n = getattr(self, 'n', 0) + 1\n"
        "        if self.n == 2 + 7: raise ValueError('poisoned sample')\n"
        "        return super().forward(x)\n"
        "def make(): return M(32, 10)\n"
    )
    (tmp_path / "poison.py").write_text(code)
    recipe = tiny_recipe(project=str(tmp_path), model={"factory": "poison:make", "config": {}},
                         batch={"effective": 6, "per_device": 6, "gpus": 1},
                         launch={"max_restarts": 5})  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml12.dump(recipe))
    done = fork_server.run(tmp_path, "run", "r.yaml", "--run-dir", "r", "--json")
    assert done.returncode == 4
    assert "no progress since step 6: rank 0: ValueError: poisoned sample" in done.stderr
    facts = json.loads(done.stdout)
    assert (facts["outcome"], facts["steps"], facts["loss"]) == ("failed", 6, None)
    assert len(json.loads((tmp_path / "r/record.json").read_text())["attempts"]) == 2


def test_a_model_that_fails_is_exit_4_and_told(tmp_path: Path) -> None:
    """The same step failing twice ends the run with the error's own words."""
    recipe = slow_recipe(tmp_path, 1)
    process = start(
        tmp_path,
        "run",
        recipe,
        "model.config.features=31",
        "launch.max_restarts=5",
        "--run-dir",
        "r",
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "no progress since step 0" in err
    assert "mat1 and mat2 shapes cannot be multiplied" in err
    assert "Traceback" not in err


def test_batchnorm_and_early_stopping(tmp_path: Path, fork_server: ForkServer) -> None:
    """A CNN with BatchNorm trains on two ranks; early stopping ends it on all ranks, best kept."""
    done = fork_server.run(
        tmp_path, "run", "cnn-batchnorm", "duration.epochs=20", "evaluation.every_steps=20",
        "early_stopping.patience=2", "early_stopping.min_delta=0.05", "--run-dir", "r", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["outcome"] == "finished"
    assert facts["steps"] < 20 * 157
    assert facts["eval"]["eval/accuracy"] > 0.8
    assert "early stopping: eval/loss has not improved" in done.stderr
    evaluations = {
        line["step"]: line["eval/loss"]
        for line in read_metrics(tmp_path / "r/metrics.jsonl")
        if "eval/loss" in line
    }
    best = min(evaluations, key=lambda step: evaluations[step])
    assert (tmp_path / f"r/checkpoints/step-{best:08d}/manifest.json").is_file()


def test_a_loss_that_explodes_is_told_not_a_crash(tmp_path: Path, fork_server: ForkServer) -> None:
    """Non-finite steps are skipped, a NaN evaluation is shown, never the best, and --json stays JSON."""
    done = fork_server.run(
        tmp_path, "run", "worked-example", "optimizer.lr=1e19", "optimizer.max_grad_norm=null",
        "schedule={name: constant, warmup_ratio: null}", "duration={epochs: null, steps: 6}",
        "evaluation.every_steps=2", "early_stopping=null", "logging.every_steps=1", "--run-dir", "r", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert facts["eval"]["eval/loss"] is None
    assert "not finite" in done.stderr
    assert any(line["skipped"] for line in steps(tmp_path / "r"))


def test_one_supervisor_at_a_time_and_no_foreign_package(tmp_path: Path) -> None:
    """A second resume of a running run is refused; a folder named drumline beside it is not imported."""
    (tmp_path / "drumline").mkdir()
    (tmp_path / "drumline/__init__.py").write_text("raise SystemExit('the wrong drumline')")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        process = start(tmp_path, "run", slow_recipe(tmp_path, 1), "--run-dir", "r")
        wait_for(lambda: (tmp_path / "r/metrics.jsonl").exists(), process)
        second = start(tmp_path, "resume", "r")
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert "another process is running it" in err
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    finally:
        del os.environ["PYTHONSAFEPATH"]


def test_epochs_on_unprepared_data_are_prepared_first(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """`run` counts the samples itself; only `plan` has to say that it cannot know."""
    done = fork_server.run(
        tmp_path, "run", "worked-example", "data.samples=null", "data.options={rows: 500}", "duration.epochs=1",
        "evaluation.every_steps=13", "checkpoint.every_steps=13", "--run-dir", "r", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 13
