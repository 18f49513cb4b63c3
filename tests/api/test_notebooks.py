"""The notebooks of docs/notebooks run from their first cell to their last, in a real kernel."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT, SOURCES

pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.heavy]

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def results(notebook: Any) -> list[str]:
    """What the cells show, as text."""
    return [
        one["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for one in cell.outputs
        if "data" in one
    ]


def executed(path: Path, folder: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        f"{path.name}: outputs are not kept"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute(
        env=environment
    )
    return notebook


def test_there_are_two() -> None:
    assert [path.name for path in NOTEBOOKS] == ["compare-runs.ipynb", "plan-a-cluster-job.ipynb"]


def test_a_cluster_job_is_planned(tmp_path: Path) -> None:
    """The plan is shown as a table with bars and a heat map; the equation holds in every row."""
    notebook = executed(NOTEBOOKS[1], tmp_path)
    (shown,) = [one["data"]["text/html"] for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs
                if "drumline-plan" in one.get("data", {}).get("text/html", "")]  # fmt: skip
    assert 'class="equation"' in shown
    assert 'class="bar-row"' in shown
    assert 'class="heat-map"' in shown
    assert any("256 = 2 × 64 × 2" in text for text in results(notebook))
    (told,) = [
        one["text"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for one in cell.outputs
        if one.get("name") == "stdout"
    ]
    assert "Nearest: effective 240" in told


def test_runs_are_compared(tmp_path: Path) -> None:
    """A run of two processes is reproduced by one, and another rate leaves the curve."""
    notebook = executed(NOTEBOOKS[0], tmp_path)
    shown = "\n".join(results(notebook))
    assert "equal within 1e-05: 12 steps and the final weights" in shown
    assert "{'two': '8 × 2 × 2', 'one': '8 × 1 × 4'}" in shown
    assert "['step-00000006', 'step-00000012']" in shown
    assert (tmp_path / "runs/one/record.json").is_file()
