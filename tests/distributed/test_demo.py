"""`make demo`: plans and trains the tiny model on real text, to the loss that the README claims."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from fork_server import ForkServer
from test_runs import start

from conftest import ROOT
from drumline.metrics_file import read_metrics

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]


def test_the_demo_learns(tmp_path: Path, fork_server: ForkServer) -> None:
    """Both commands of `make demo`: from about 5.5 nats a byte to a validation loss under 2.6."""
    listed = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in listed.stdout.splitlines() if "/drumline " in line]
    assert [shlex.split(line)[1] for line in lines] == ["plan", "run"]
    for line in lines:
        arguments = [a.replace("recipes/", f"{ROOT}/recipes/") for a in shlex.split(line)[1:]]
        process = start(tmp_path, *arguments, *(["--json"] if arguments[0] == "run" else []))
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    again = fork_server.run(tmp_path, "plan", "runs/tiny-code-lm-1", "--gpus", "1")
    assert "32 = 8 per_device × 1 gpus × 4 accumulation" in again.stdout
    facts = json.loads(out)
    assert facts["eval"]["eval/loss"] < 2.6
    words = ("reproduce", "runs/tiny-code-lm-1", "--gpus", "1", "--steps", "15")
    again = fork_server.run(tmp_path, *words)
    assert again.stdout.startswith("equal within 1e-05: 15 steps")
    again = fork_server.run(tmp_path, "report", "runs/tiny-code-lm-1")
    assert again.stdout.strip().endswith("runs/tiny-code-lm-1/report.html")
    first = read_metrics(Path(facts["run"]) / "metrics.jsonl")[0]
    assert 5.3 < first["loss"] < 5.7
    assert "run   runs/tiny-code-lm-1" in err
    assert err.splitlines()[-1].startswith("next  drumline plan runs/tiny-code-lm-1 --gpus 4")
