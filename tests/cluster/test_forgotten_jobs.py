"""A job that the controller no longer knows: from sacct with accounting, else from the completion log."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import why_not

from conftest import ROOT, SOURCES

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]


@pytest.mark.parametrize(
    ("arguments", "programs", "source"),
    [([], [], "sacct --completion"), (["accounting"], ["slurmdbd", "mariadbd"], "sacct")],
)
def test_a_forgotten_job(
    tmp_path: Path, arguments: list[str], programs: list[str], source: str
) -> None:
    """scontrol tells at first; afterwards the other source gives the same state."""
    if reason := why_not("sacct", "unshare", "ip", *programs):
        pytest.skip(reason)
    script = str(Path(__file__).with_name("forgotten_job.py"))
    command = ["unshare", "--mount", "--net", sys.executable, script, str(tmp_path), *arguments]
    env = {**os.environ, "PYTHONPATH": f"{SOURCES}:{ROOT}/tests:{ROOT}/tests/distributed"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after, accounts = json.loads(done.stdout)
    assert (before["state"], before["source"]) == ("FAILED", "scontrol")
    assert (after["state"], after["source"]) == ("FAILED", source)
    if arguments:
        assert accounts[0].startswith("account: chemistry: this user has ")
        assert "physics" in accounts[0]
        assert accounts[1].startswith("qos: fast: account physics has normal")
        assert accounts[2] == ""
    assert before["nodes"] == "node[0-1]"
    assert after["nodes"] == before["nodes"] or arguments  # the database kept the first node alone
