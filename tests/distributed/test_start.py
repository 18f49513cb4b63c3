"""A start: no variable and no host name spoils it, a signal ends it at once, its seconds are told by phase."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_environment import HARMLESS, LIBRARIES, variables_of
from test_runs import start, wait_for

from conftest import SOURCES, tiny_recipe
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12
from drumline_launchers import LAUNCHERS
from drumline_launchers.environment import is_cleared

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

SYSTEM = {
    "PATH",
    "PYTHONPATH",
    "USER",
    "CUDA_VISIBLE_DEVICES",
    "TMPDIR",
    "TEMP",
    "TMP",
    "LIBRARY_PATH",
}
"""What a hostile value of would only say that the machine is broken."""


def small(folder: Path, **sections: Any) -> None:
    recipe = tiny_recipe(duration={"steps": 4}, logging={"every_steps": 1}, **sections)
    (folder / "r.yaml").write_text(yaml12.dump(recipe))


def numbers(run: Path) -> list[tuple[Any, ...]]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    return [(line["step"], line["digest"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two ranks, in an ordinary environment."""
    folder = tmp_path_factory.mktemp("clean")
    small(folder)
    done = run_in(folder, {}, "torchrun")
    assert done.returncode == 0, done.stderr
    return folder / "torchrun"


def run_in(
    folder: Path, variables: dict[str, str], launcher: str, host: str = ""
) -> subprocess.CompletedProcess[str]:
    """`drumline run` with further variables; `host`: in a namespace where the machine has this name."""
    env = {**os.environ, "PYTHONPATH": SOURCES, **variables}
    command = [sys.executable, "-m", "drumline.cli", "run", "r.yaml", f"launch.launcher={launcher}",
               "--run-dir", launcher]  # fmt: skip
    if host:
        command = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host, *command]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=150, check=False
    )


def hostile(is_meant: Any) -> dict[str, str]:
    names = {name for library in LIBRARIES for name in variables_of(library)}
    return {name: "7" for name in sorted(names) if is_meant(name)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_variable_and_no_host_name_changes_a_training(
    tmp_path: Path, clean: Path, launcher: str
) -> None:
    """All variables by which a library is configured set to 7, on a host whose name does not resolve."""
    small(tmp_path)
    variables = hostile(is_cleared) | {"MASTER_ADDR": "nowhere.invalid", "PYTHONOPTIMIZE": "2"}
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "PET_NNODES", "PET_MASTER_ADDR"} <= set(
        variables
    )
    can_rename = os.geteuid() == 0 and shutil.which("unshare") is not None
    done = run_in(tmp_path, variables, launcher, "nowhere.invalid" if can_rename else "")
    assert done.returncode == 0, done.stderr
    ours, theirs = numbers(tmp_path / launcher), numbers(clean)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[2:] == pytest.approx(other[2:], rel=1e-5)
    (attempt,) = json.loads((tmp_path / launcher / "record.json").read_text())["attempts"]
    assert set(variables) - {"MASTER_ADDR"} <= set(attempt["cleared"])
    phases = attempt["start_s"]
    assert list(phases) == ["plan", "launch", "start", "imports", "joining the other ranks", "building the model",
                            "load", "warm-up"]  # fmt: skip
    assert 0.5 < sum(phases.values()) < 150


def test_what_the_ranks_keep_changes_no_training_either(tmp_path: Path, clean: Path) -> None:
    """All variables called harmless set to 7: the same numbers, and the values in the record."""
    small(tmp_path)
    harmless = {name for names in HARMLESS.values() for name in names.split()}
    variables = hostile(lambda name: name in harmless - SYSTEM)
    done = run_in(tmp_path, variables, "torchrun")
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "torchrun") == numbers(clean)
    (attempt,) = json.loads((tmp_path / "torchrun/record.json").read_text())["attempts"]
    assert attempt["environment"]["HF_HOME"] == "7"


def test_a_signal_before_the_ranks_train_ends_the_start_at_once(tmp_path: Path) -> None:
    """SIGTERM while the ranks start: 75 in seconds, nothing to save, nothing left; a resume trains."""
    small(tmp_path)
    process = start(tmp_path, "run", "r.yaml", "--run-dir", "r")
    wait_for(lambda: (tmp_path / "r/logs/attempt-0/launcher.log").exists(), process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM before the ranks had begun to train" in err
    assert time.monotonic() - began < 20
    resumed = subprocess.run(
        [sys.executable, "-m", "drumline.cli", "resume", "r"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": SOURCES}, timeout=150, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert [line[0] for line in numbers(tmp_path / "r")] == [1, 2, 3, 4]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    """Started with SIGHUP ignored, as by nohup: a SIGHUP changes nothing."""
    small(tmp_path, schedule={"name": "constant"})
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "drumline.cli", "run", "r.yaml", "--run-dir", "r"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": SOURCES}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "r/logs/attempt-0/launcher.log").exists(), process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [line[0] for line in numbers(tmp_path / "r")] == [1, 2, 3, 4]


def test_a_run_without_stderr_trains(tmp_path: Path) -> None:
    """stderr closed and stdout full: the run folder is whole, and the exit code says that only the output failed."""
    small(tmp_path)
    command = f"exec {sys.executable} -m drumline.cli run r.yaml --run-dir r --json 2>&- >/dev/full"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": SOURCES}, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 74
    record = json.loads((tmp_path / "r/record.json").read_text())
    assert record["outcome"] == "finished"
    assert record["weights"]["step"] == 4
