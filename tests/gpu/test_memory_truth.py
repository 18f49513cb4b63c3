"""Predicted against real peaks, where there is a GPU."""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

torch = pytest.importorskip("torch")
SCRIPT = ROOT / "benchmarks/memory_truth.py"
TOTALS = ("allocated", "reserved", "device")


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows below the line that names the machine."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    return list(csv.DictReader(lines[1:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_nothing_said_to_fit_runs_out_of_memory(tmp_path: Path) -> None:
    """Two minutes of the grid: allocated within 2 % (median), reserved within 5 %, none wrongly fits."""
    path = tmp_path / "truth.csv"
    command = [sys.executable, str(SCRIPT), "--minutes", "2", "--csv", str(path)]
    subprocess.run(command, check=True, timeout=600)
    rows = rows_of(path)
    assert not [r for r in rows if r["outcome"] != "trained" and r["fits"] == "True"]
    for name, most in (("allocated", 0.02), ("reserved", 0.05)):
        errors = [abs(int(r[f"expected_{name}"]) / int(r[f"measured_{name}"]) - 1) for r in rows
                  if r["outcome"] == "trained"]  # fmt: skip
        assert statistics.median(errors) <= most


def test_the_script_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """On real CPU tensors, through the real loop: three steps of two tiny models, within 2 %."""
    path = tmp_path / "truth.csv"
    done = subprocess.run([sys.executable, str(SCRIPT), "--smoke", "--csv", str(path)],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(path)
    assert [row["outcome"] for row in rows] == ["trained", "trained"]
    for row in rows:
        error = int(row["expected_allocated"]) / int(row["measured_allocated"]) - 1
        assert abs(error) <= 0.02
