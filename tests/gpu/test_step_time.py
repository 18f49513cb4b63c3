"""The benchmark of steps on a GPU, rehearsed without one at tiny sizes, so that it runs where there is one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

torch = pytest.importorskip("torch")
SCRIPT = ROOT / "benchmarks/step_time.py"


def measured(folder: Path, *options: str, **environment: str) -> list[dict[str, str]]:
    """The rows that the script writes into this folder."""
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--figure", str(folder / "mfu.svg"), *options]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.csv")
    first, *lines = path.read_text().splitlines()
    assert first.startswith("# torch ")
    assert (folder / "mfu.svg").read_text().startswith("<svg")
    return list(csv.DictReader(lines))


def test_every_option_runs_on_tiny_models(tmp_path: Path) -> None:
    """On the CPU; the compiler itself is left out, which takes minutes."""
    rows = measured(tmp_path, "--rehearse", TORCH_COMPILE_DISABLE="1")
    assert {row["outcome"] for row in rows} == {"trained"}
    full = [row for row in rows if row["training"] == "full"]
    assert [row["option"] for row in full] == [
        "plain", "fused optimizer", "flash attention", "chunked loss", "selective checkpointing", "compile",
        "fused, flash", "fused, flash, compile", "all",
    ]  # fmt: skip
    assert all(float(row["ms"]) > 0 and int(row["tokens_per_s"]) > 0 for row in rows)
    beside = [row for row in rows if row["by_hand_ms"]]
    assert len(beside) == 3
    for row in beside:
        assert float(row["ratio"]) > 0
        assert float(row["trainer_ms"]) > 0
    assert "lora" in {row["training"] for row in rows}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_it_runs_on_this_gpu(tmp_path: Path) -> None:
    """Two minutes of the grid: what trains has an MFU, and is not slower than the loop by hand by more than 5 %."""
    rows = measured(tmp_path, "--minutes", "2", "--only", "llama-1b")
    trained = [row for row in rows if row["outcome"] == "trained"]
    assert trained
    assert all(0 < float(row["mfu"]) < 1 for row in trained)
    assert all(float(row["ratio"]) < 1.05 for row in trained if row["ratio"])
