"""A secret that an exception repeats stands nowhere in the run folder."""

import os
from pathlib import Path

import pytest
from fork_server import ForkServer

from conftest import tiny_recipe
from drumline.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

PROJECT = """\
import os
from torch import nn


class Leaky(nn.Linear):
    def forward(self, x):
        print("connecting with", os.environ["PGPASSWORD"])
        raise ConnectionError(f"postgres://me:{os.environ['PGPASSWORD']}@db: https://u:urlsecret1@h/x?token=querysecret")


def make(features, hidden, classes):
    return Leaky(features, classes)
"""
PLANTED = ("hunter22-variable", "urlsecret1", "querysecret")


def test_a_secret_in_an_exception_is_written_nowhere(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record, outcome files, logs of ranks and launcher, report: a variable's value, an address, a query."""
    monkeypatch.setenv("PGPASSWORD", PLANTED[0])
    (tmp_path / "leaky.py").write_text(PROJECT)
    recipe = tiny_recipe(project=".", model={"factory": "leaky:make"}, launch={"max_restarts": 0})
    (tmp_path / "r.yaml").write_text(yaml12.dump(recipe))
    done = fork_server.run(tmp_path, "run", "r.yaml", "--run-dir", "r")
    assert done.returncode == 4
    assert "ConnectionError" in done.stderr
    assert fork_server.run(tmp_path, "report", "r").returncode == 0
    files = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        raw = path.read_bytes()
        for secret in PLANTED:
            assert secret.encode() not in raw, path
    logs = [path.read_text() for path in (tmp_path / "r/logs/attempt-0").glob("rank-*.log")]
    assert any(
        "connecting with [secret]" in log for log in logs
    )  # the other rank may be ended first
    assert os.environ["PGPASSWORD"] == PLANTED[0]
