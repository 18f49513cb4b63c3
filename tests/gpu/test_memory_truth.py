"""Predicted against real peaks, where there is a GPU."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from drumline.memory.calibration import from_plain

torch = pytest.importorskip("torch")
SCRIPT = ROOT / "benchmarks/memory_truth.py"
TOTALS = ("allocated", "reserved", "device")


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows below the line that names the machine."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    return list(csv.DictReader(lines[1:]))


def measured(folder: Path, *options: str) -> list[dict[str, str]]:
    """Run the script, which writes into this folder and a copy of the docs; its rows."""
    docs = folder / "memory.md"
    docs.write_text((ROOT / "docs/memory.md").read_text())
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--docs", str(docs), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.csv")
    return rows_of(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_nothing_said_to_fit_runs_out_of_memory(tmp_path: Path) -> None:
    """Two minutes of the grid: allocated within 2 % (median), reserved within 5 %, none wrongly fits."""
    rows = measured(tmp_path, "--minutes", "2")
    assert not [r for r in rows if r["outcome"] != "trained" and r["verdict"] == "fits"]
    for name, most in (("allocated", 0.02), ("reserved", 0.05)):
        errors = [abs(int(r[f"expected_{name}"]) / int(r[f"measured_{name}"]) - 1) for r in rows
                  if r["outcome"] == "trained"]  # fmt: skip
        assert statistics.median(errors) <= most


def test_the_script_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """On real CPU tensors, through the real loop: three steps of two tiny models, within 2 %.

    The calibration table is one that plans read, and the docs name the machine with its errors.
    """
    rows = measured(tmp_path, "--smoke")
    assert [row["outcome"] for row in rows] == ["trained", "trained"]
    for row in rows:
        error = int(row["expected_allocated"]) / int(row["measured_allocated"]) - 1
        assert abs(error) <= 0.02
    (table,) = tmp_path.glob("*.yaml")
    (row,) = from_plain(json.loads(table.read_text()), str(table)).rows
    assert (row.gpu, row.strategy, row.runs) == ("cpu", "ddp", 2)
    assert 0.98 <= row.allocated[0] <= row.allocated[2] <= 1.02
    docs = (tmp_path / "memory.md").read_text()
    assert f"torch {torch.__version__}" in docs
    assert "above high 0 of 2 | 0 of 2 |" in docs
