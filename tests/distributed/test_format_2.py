"""Runs and checkpoints of the version before the redesign (format 2) still resume, reproduce and report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from drumline.compare.sources import read_logged
from drumline.metrics_file import read_metrics
from drumline.plan.identity import plain_sha256, recipe_sha256, training_sha256
from drumline.plan.model import read_plan
from drumline.recipe.load import validate
from drumline.runs.health import examine

FIXTURE = ROOT / "tests/fixtures/format_2"
RUNS = ("finished-lm", "finished-mlp", "stopped-lm")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The fixture's folders, with the paths in them where the test has put them."""
    base = tmp_path / "runs"
    shutil.copytree(FIXTURE, base)
    for path in base.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            path.write_text(path.read_text().replace("@FOLDER@", str(base)))
    return base


@pytest.mark.parametrize("name", RUNS)
def test_hashes_plans_and_lines_are_read_as_they_were(runs: Path, name: str) -> None:
    """Keys that came later leave a recipe's hashes alone; an old plan loads; old lines get their kind."""
    record = json.loads((runs / name / "record.json").read_text())
    recipe = validate(record["recipe"], name)
    assert recipe_sha256(recipe) == plain_sha256(record["recipe"]) == record["recipe_sha256"]
    assert training_sha256(recipe) == record["training_sha256"]
    plan = read_plan((runs / name / "plan-0.json").read_text())
    assert plan.training_sha256 == record["training_sha256"]
    lines = read_metrics(runs / name / "metrics.jsonl")
    assert not any('"kind"' in text for text in (runs / name / "metrics.jsonl").open())
    assert {line["kind"] for line in lines} >= {"step", "event"}
    logged = read_logged(str(runs / name))
    assert [line["step"] for line in logged.steps] == list(range(1, logged.steps[-1]["step"] + 1))


def test_a_stopped_run_goes_on(forked: Any, runs: Path) -> None:
    """From its old checkpoint, at another split, to the end; each step once, then reproduced from the record."""
    run = runs / "stopped-lm"
    at = json.loads((run / "record.json").read_text())["attempts"][-1]["step"]
    done = forked("resume", str(run), "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 60
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, 61))
    assert f"going on from step-{at:08d}" in done.stderr


@pytest.mark.parametrize("name", ["finished-lm", "finished-mlp"])
def test_a_finished_run_is_reproduced(forked: Any, runs: Path, name: str) -> None:
    """The same initial weights, samples, losses and final weights as the version before.

    To the last bit on CPUs like the recorded one; products of another kind, also of the same maker and name,
    round otherwise. A sample or an initial weight that were another would be off by a thousand times more.
    """
    done = forked("reproduce", str(runs / name), "--trust-code", "--json", "--run-dir", "again")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    theirs, ours = (
        [line["loss"] for line in read_metrics(path / "metrics.jsonl") if line["kind"] == "step"]
        for path in (runs / name, Path(found["run"]))
    )
    assert len(ours) == len(theirs)
    if ours == theirs:  # a CPU that rounds as the recorded one did
        assert found["verdict"] == "identical", found["words"]
        assert found["weights_error"] == 0.0
    else:
        assert found["verdict"] in ("identical", "equal"), found["words"]
        assert found["weights_error"] < 1e-6


def test_it_is_reported(forked: Any, runs: Path) -> None:
    """report, runs, doctor and status read what an older version wrote, and change nothing in it."""
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    for arguments in (
        ("report", str(runs / "finished-lm"), "--output", "page.html"),
        ("runs", str(runs)),
        ("doctor", str(runs / "finished-mlp")),
        ("status", str(runs / "stopped-lm")),
    ):
        done = forked(*arguments)
        assert done.returncode == 0, done.stderr
    after = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    assert after == before


def test_the_last_step_is_not_that_of_a_late_event(runs: Path) -> None:
    """An asynchronous save is told of after later steps; where the run stands is its last step line."""
    run = runs / "finished-mlp"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 4, "checkpoint/saved": "step-00000004"}\n')
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    assert examine(run).step == steps[-1] > 4
