"""Seconds of a step as a run measured them, beside those that were planned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.runs.folder import RunFolder
from drumline.runs.step_times import time_entry, time_words
from drumline.session.planning import make_plan
from drumline.session.progress import Progress


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_recipe("llama-8b-8xh100"))


def folder_of(path: Path, seconds: list[float]) -> RunFolder:
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "loss": 1.0, "lr": 0.1, "seconds": value}
        for step, value in enumerate(seconds, start=1)
    ]
    half = len(lines) // 2
    lines.insert(half, {"kind": "evaluation", "step": half, "eval/loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(path)


def test_the_median_of_the_attempt_s_own_steps(tmp_path: Path, plan: Plan) -> None:
    """The first steps of an attempt are slower, and those before it are another's."""
    folder = folder_of(tmp_path, [9.0, 9.0, 9.0, 1.0, 1.2, 1.1, 50.0, 50.0, 50.0, 2.0, 2.4, 2.2])
    planned = plan.time
    assert planned
    assert time_entry(plan, folder, 6) == {
        "planned_s": planned.step_s.expected,
        "measured_s": pytest.approx(2.2),
    }
    assert time_entry(plan, folder, 0)["measured_s"] == pytest.approx(2.2)  # of nine steps
    assert time_entry(plan, folder, 10)["measured_s"] is None
    assert time_entry(replace(plan, time=None), folder, 6)["planned_s"] is None


def test_only_the_end_of_a_long_run_is_read(tmp_path: Path, plan: Plan) -> None:
    folder = folder_of(tmp_path, [5.0] * 5000 + [3.0] * 200)
    assert time_entry(plan, folder, 0)["measured_s"] == 3.0


def test_what_is_said_at_the_end(plan: Plan) -> None:
    assert plan.time
    expected = plan.time.step_s.expected
    assert ", within " in time_words({"measured_s": 1.1 * expected}, plan)
    assert ", outside " in time_words({"measured_s": 2 * expected}, plan)
    assert time_words({"measured_s": None}, plan) == ""
    assert time_words(None, plan) == ""
    assert time_words({"measured_s": 1.0}, replace(plan, time=None)) == ""


def test_progress_tells_the_rate_against_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it goes: samples a second, and their share of what the plan expects, if it expects a time."""
    folder = RunFolder(tmp_path)
    line = {"kind": "step", "step": 2, "loss": 1.5, "lr": 1e-3, "samples_per_s": 60.0}
    for planned, words in ((80.0, "60 samples/s (75% of the planned)"), (None, "60 samples/s\n")):
        folder.metrics_file.write_text("")
        progress = Progress(10, planned)
        progress(folder)
        folder.metrics_file.write_text(json.dumps(line) + "\n")
        progress(folder)
        progress.close()
        told = capsys.readouterr().err
        assert words in told
        assert ("planned" in told) == (planned is not None)
