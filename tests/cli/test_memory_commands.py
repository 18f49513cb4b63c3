"""plan --trace, --fix, --sweep and calibrate through the real command."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.recipe import yaml12

MISFIT = ["llama-1b-8xh100", "batch.per_device=32", "batch.accumulation=2"]


def test_fix_applies_the_cheapest_change(drumline: Any) -> None:
    """A recipe that exits 3 exits 0 with --fix, at the same batch; the change is told."""
    assert drumline("plan", *MISFIT).returncode == 3
    done = drumline("plan", *MISFIT, "--fix", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["memory"]["fits"] is True
    assert plan["batch"]["effective"] == 512
    assert "--fix: batch.per_device=" in done.stderr


def test_fix_says_when_nothing_fits(drumline: Any) -> None:
    """70B of ZeRO-0 on one L4: no change is known, exit 3."""
    done = drumline("plan", "llama-70b-64xh100", "--fix", "--gpus", "1", "--gpu", "l4",
                    "cluster.gpus_per_node=null", "strategy.name=ddp")  # fmt: skip
    assert done.returncode == 3
    assert "no change that is known" in done.stderr


def test_sweep_prints_a_table_and_writes_a_page(drumline: Any, tmp_path: Path) -> None:
    """Every cell of the page stands in the table; the page needs no network."""
    done = drumline("plan", "llama-8b-8xh100", "--sweep")
    assert done.returncode == 0, done.stderr
    assert "gpus per_device" in done.stdout
    page = (tmp_path / "llama-8b-8xh100-memory.html").read_text()
    assert "src=" not in page
    assert "http" not in page
    assert page.count("<td") > 50
    cells = json.loads(drumline("plan", "llama-8b-8xh100", "--sweep", "--json").stdout)["cells"]
    assert page.count("<td class") == len(cells)


def test_sweep_of_an_unknown_model_says_so(drumline: Any) -> None:
    """No table is made up."""
    done = drumline("plan", "worked-example", "--sweep")
    assert done.returncode == 2
    assert "no closed form" in done.stderr


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that is kept changes later plans; other tests must not see it."""
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_trace_from_the_command_line(drumline: Any) -> None:
    """A model without a closed form is unknown, and known once traced, also to later plans of the same step."""
    plain = json.loads(drumline("plan", "worked-example", "--json").stdout)
    assert plain["memory"]["method"] == "unknown"
    assert plain["memory"]["fits"] is None
    assert any("--trace" in warning for warning in plain["warnings"])
    assert drumline("prepare", "worked-example").returncode == 0
    done = drumline("plan", "worked-example", "--trace", "--json")
    assert done.returncode == 0, done.stderr
    traced = json.loads(done.stdout)
    assert traced["memory"]["method"] == "traced"
    assert traced["memory"]["fits"] is True
    # 32 features, 64 hidden, 10 classes: weights, momentum and gradients are 2,762 fp32 numbers each.
    parameters = sum(a * b + b for a, b in ((32, 64), (64, 10)))
    assert traced["memory"]["parts"]["parameters"] >= 4 * parameters
    assert not any("--trace" in warning for warning in traced["warnings"])
    again = json.loads(drumline("plan", "worked-example", "optimizer.lr=0.5", "--json").stdout)
    assert again["memory"] == traced["memory"]
    assert not any("--trace" in warning for warning in again["warnings"])
    card = "cluster.gpu={name: tiny, memory_gib: 0.001, bf16_tflops: 1}"
    assert drumline("plan", "worked-example", card, "--json").returncode == 3
    other = json.loads(drumline("plan", "worked-example", "precision=bf16", "--json").stdout)
    assert other["memory"]["method"] == "unknown"


@pytest.mark.usefixtures("own_cache")
def test_a_kept_trace_is_not_that_of_edited_code(drumline: Any, tmp_path: Path) -> None:
    """The model's factory, and what it imports from its project, are part of what a trace depends on."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom widths import WIDTH\n\n\n"
        "def make(features, hidden, classes):\n"
        "    return nn.Sequential(nn.Linear(features, WIDTH), nn.Linear(WIDTH, classes))\n"
    )
    (tmp_path / "widths.py").write_text("WIDTH = 64\n")
    recipe = tiny_recipe(project=".", model={"factory": "mine:make"})
    (tmp_path / "r.yaml").write_text(yaml12.dump(recipe))
    done = drumline("prepare", "r.yaml")
    assert done.returncode == 0, done.stderr

    def method(*options: str) -> str:
        done = drumline("plan", "r.yaml", "--json", *options)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["memory"]["method"])

    assert [method(), method("--trace"), method()] == ["unknown", "traced", "traced"]
    (tmp_path / "widths.py").write_text("WIDTH = 4096\n")
    assert method() == "unknown"
    (tmp_path / "widths.py").write_text("WIDTH = 64\n")
    assert method() == "traced"
    (kept,) = (tmp_path / "cache").rglob("traces/*")
    kept.write_bytes(kept.read_bytes()[:100])
    assert method() == "unknown"  # a damaged file is as good as none


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch.launcher=deepspeed", "strategy.name=zero2"], "DeepSpeed cannot be traced"),
    ],
)
def test_what_cannot_be_traced_is_said(drumline: Any, overrides: list[str], words: str) -> None:
    """One message and exit 2."""
    done = drumline("plan", "tiny-code-lm", *overrides, "--trace")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def write_run(folder: Path, measured: dict[str, int] | None, predicted: dict[str, int]) -> Path:
    """A record as a run on a GPU leaves it. Stands in for one: there is no GPU where this runs."""
    folder.mkdir()
    recipe = {"recipe": "r", "cluster": {"gpu": "h100-80gb"}, "strategy": {"name": "ddp"}}
    memory = {
        "method": "closed-form",
        "phase": "backward",
        "predicted": predicted,
        "measured": measured,
    }
    split = {"per_device": 1, "gpus": 1, "accumulation": 1}
    attempt = {"number": 0, "cause": "start", "split": split, "started": "2026-11-01T00:00:00+00:00", "ended": None,
               "outcome": "finished", "kind": "finished", "memory": memory}  # fmt: skip
    record = {"attempts": [attempt], "outcome": "finished", "restarts": 0, "training_sha256": "x",
              "data": {"fingerprint": None}, "recipe": recipe,
              "plan": {"steps": {"total": 1}, "batch": {"effective": 1, **split}}}  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_calibrate_learns_what_runs_measured(drumline: Any, tmp_path: Path) -> None:
    """Four runs that needed 10 % more than predicted: the error goes to zero, and plans grow by 10 %."""
    runs = []
    for number in range(4):
        size = (10 + number) * 10**9
        predicted = {"allocated": size, "reserved": size + 10**9, "device": size + 2 * 10**9}
        measured = {"allocated": int(1.1 * size), "reserved": int(1.1 * (size + 10**9)),
                    "device": int(1.1 * (size + 10**9)) + 7 * 10**8}  # fmt: skip
        run = write_run(tmp_path / f"run-{number}", measured, predicted)
        record = json.loads((run / "record.json").read_text())
        record["attempts"][0]["time"] = {"planned_s": 2.0, "measured_s": 2.4 + number / 10}
        (run / "record.json").write_text(json.dumps(record))
        runs.append(str(run))
    done = drumline("calibrate", *runs)
    assert done.returncode == 0, done.stderr
    assert "before  -9.09 %  -9.09 %   after  +0.00 %" in done.stdout
    assert "by a table made without the run" in done.stdout
    assert "step time  before -21.54 %" in done.stdout

    before = json.loads(drumline("plan", "llama-1b-8xh100", "--json").stdout)
    plain = before["memory"]
    import os

    os.environ["DRUMLINE_CALIBRATION"] = str(tmp_path / "calibration.yaml")
    try:
        after = json.loads(drumline("plan", "llama-1b-8xh100", "--json").stdout)
        corrected = after["memory"]
        other = json.loads(drumline("plan", "llama-8b-8xh100", "--json").stdout)["memory"]
    finally:
        del os.environ["DRUMLINE_CALIBRATION"]
    ratio = corrected["allocated"]["expected"] / plain["allocated"]["expected"]
    assert ratio == pytest.approx(1.1, rel=1e-4)
    assert "corrected by 4 runs on h100-80gb, ddp" in corrected["why"]
    outside = corrected["device"]["expected"] - corrected["reserved"]["expected"]
    assert outside == pytest.approx(7e8, rel=1e-6)
    assert "corrected" not in other["why"]  # fsdp has no row
    step, was = after["time"]["step_s"], before["time"]["step_s"]
    assert step["expected"] / was["expected"] == pytest.approx(2.55 / 2)
    assert step["low"] / step["expected"] == pytest.approx(0.9)
    assert step["high"] / step["expected"] == pytest.approx(1.1)
    assert after["time"]["basis"] == "measured by 4 runs on h100-80gb, ddp"


def test_calibrate_needs_real_peaks(drumline: Any, tmp_path: Path) -> None:
    """A run on a CPU has none: one message, exit 2, no table."""
    run = write_run(tmp_path / "run", None, {"allocated": 1, "reserved": 1, "device": 1})
    done = drumline("calibrate", str(run))
    assert done.returncode == 2
    assert "no attempt has logged real peaks" in done.stderr
    assert not (tmp_path / "calibration.yaml").exists()
