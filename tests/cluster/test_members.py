"""Two nodes without srun, as pods have it: one attends, the other follows, through the run folder alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lab import wait

from conftest import SOURCES, run_drumline, tiny_recipe
from drumline.errors import RunFolderError
from drumline.metrics_file import read_metrics
from drumline.rank_files import RankFiles
from drumline.recipe import yaml12
from drumline.runs.folder import RunFolder
from drumline.session.members import adopt

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]

SLOW = "import time\nfrom torch import nn\n\n\nclass Slow(nn.Sequential):\n    def forward(self, x):\n        time.sleep(0.05)\n        return super().forward(x)\n\n\ndef make(features, hidden, classes):\n    return Slow(nn.Linear(features, hidden), nn.Linear(hidden, classes))\n"


def start_nodes(folder: Path, **environment: str) -> list[subprocess.Popen[str]]:
    """`drumline attend r --nodes 2` as node 0 and as node 1."""
    command = [
        sys.executable,
        "-m",
        "drumline.cli",
        "attend",
        "r",
        "--nodes",
        "2",
        "--from",
        "config",
    ]
    return [
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env={**os.environ, "PYTHONPATH": SOURCES, "JOB_COMPLETION_INDEX": str(node),
                              "POD_IP": "127.0.0.1", **environment})
        for node in (0, 1)
    ]  # fmt: skip


def recipe(folder: Path, **sections: Any) -> None:
    """Two nodes of one rank; only a recipe.yaml is given."""
    (folder / "config").mkdir()
    (folder / "slow.py").write_text(SLOW)
    plain = tiny_recipe(project=str(folder), model={"factory": "slow:make"}, duration={"steps": 20},
                        batch={"effective": 12, "per_device": 6, "gpus": 2}, cluster={"gpus_per_node": 1},
                        checkpoint={"every_steps": 5}, logging={"every_steps": 1}, **sections)  # fmt: skip
    (folder / "config/recipe.yaml").write_text(yaml12.dump(plain))


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "r/metrics.jsonl") if "lr" in line]


def test_two_nodes_meet_and_both_leave_with_the_outcome(tmp_path: Path) -> None:
    """Finished by two ranks; a rank killed on the other node costs an attempt, not the run; exit 0 twice."""
    recipe(tmp_path)
    nodes = start_nodes(tmp_path)
    wait(lambda: len(steps(tmp_path)) >= 7, 120)
    process = RankFiles(tmp_path / "r/logs/attempt-0", 1).process()
    assert process
    process.send(signal.SIGKILL)
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert steps(tmp_path) == list(range(1, 21))
    record = json.loads((tmp_path / "r/record.json").read_text())
    assert [a["kind"] for a in record["attempts"]] == ["lost", "finished"]
    assert record["attempts"][0]["cause"] == "start on 2 nodes"
    assert record["data"]["fingerprint"]


RECORD = (
    '{"plan": {"steps": {"total": 1}, "batch": {"effective": 1, "per_device": 1, "gpus": 1, "accumulation": 1}}, '
    '"recipe": {"recipe": "r"}, "training_sha256": "%s", "attempts": [], "restarts": 0, "outcome": null, '
    '"data": {"fingerprint": null}}'
)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """The same training goes on in it; another one of the same name does not report its success."""
    source, folder = tmp_path / "config", RunFolder(tmp_path / "r")
    source.mkdir()
    folder.path.mkdir()
    (source / "recipe.yaml").write_text("recipe: a\n")
    (source / "record.json").write_text(RECORD % "aa")
    folder.record_file.write_text(RECORD % "aa")
    adopt(source, folder)
    folder.record_file.write_text(RECORD % "bb")
    with pytest.raises(
        RunFolderError, match="another run has this folder .training_sha256 bb, not aa"
    ):
        adopt(source, folder)


def test_the_submitted_code_reaches_the_pods(tmp_path: Path) -> None:
    """The ConfigMap holds the project's code; a node writes it into the run folder, and the recipe names it there."""
    project = tmp_path / "project"
    (project / "package").mkdir(parents=True)
    (project / "slow.py").write_text(SLOW)
    (project / "package/part.py").write_text("VALUE = 1\n")
    (project / ".env").write_text("HF_TOKEN=x\n")
    (tmp_path / "s.yaml").write_text(
        yaml12.dump({"site": "a", "kubernetes": {"image": "i", "claim": "c"}})
    )
    (tmp_path / "r.yaml").write_text(
        yaml12.dump(tiny_recipe(project=str(project), model={"factory": "slow:make"}))
    )
    done = run_drumline(tmp_path, "submit", "r.yaml", "--to", "kubernetes", "--site", "s.yaml", "--run-dir", "name",
                        "--dry-run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml12.parse(done.stdout.partition("---\n")[0])["data"]
    assert yaml12.parse(config["recipe.yaml"])["project"] == "/runs/name/code"
    assert json.loads(config["record.json"])["recipe"]["project"] == "/runs/name/code"
    source, folder = tmp_path / "config", RunFolder(tmp_path / "name")
    source.mkdir()
    for name, text in config.items():
        (source / name).write_text(text)
    adopt(source, folder)
    code = {
        str(p.relative_to(folder.path / "code")): p.read_text()
        for p in (folder.path / "code").rglob("*.py")
    }
    assert code == {"slow.py": SLOW, "package/part.py": "VALUE = 1\n"}
    assert not (folder.path / "code/.env").exists()


def test_stopped_on_a_signal_both_leave_with_75(tmp_path: Path) -> None:
    """SIGTERM to the first node alone, as a pod's deletion: both ranks save."""
    recipe(tmp_path, launch={"max_restarts": 0})
    nodes = start_nodes(tmp_path)
    wait(lambda: len(steps(tmp_path)) >= 3, 120)
    nodes[0].send_signal(signal.SIGTERM)
    outs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], outs
    assert list((tmp_path / "r/checkpoints").glob("step-*"))


@pytest.mark.parametrize("flag", ["stop", "ended", "stacks"])
def test_ranks_that_no_signal_reaches_look_at_files(tmp_path: Path, flag: str) -> None:
    """A rank whose supervisor is on another host stops, ends or tells its stacks by a file beside its log."""
    from drumline.recipe.load import load_recipe
    from drumline.session.planning import make_plan
    from drumline.session.prepare import prepare_data

    recipe(tmp_path, launch={"max_restarts": 0})
    loaded = load_recipe(
        str(tmp_path / "config/recipe.yaml"),
        [
            "batch.gpus=1",
            "batch.accumulation=null",
            "cluster.gpus_per_node=1",
            "duration.steps=2000",
        ],
    )
    prepare_data(loaded)
    logs = tmp_path / "r/logs/attempt-0"
    logs.mkdir(parents=True)
    (tmp_path / "r/checkpoints").mkdir()
    (tmp_path / "r/plan-0.json").write_text(make_plan(loaded).to_json())
    env = {
        **os.environ,
        "PYTHONPATH": SOURCES,
        "DRUMLINE_SUPERVISOR": "1 1 another-host",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "drumline.train.worker",
        "--plan",
        "r/plan-0.json",
        "--run-dir",
        "r",
    ]
    rank = subprocess.Popen(command, cwd=tmp_path, env=env)
    try:
        wait(lambda: len(steps(tmp_path)) >= 3, 120)
        (logs / flag).touch()
        began = time.monotonic()
        if flag == "stacks":
            wait(lambda: "most recent call first" in (logs / "rank-0.log").read_text(), 10)
            assert rank.poll() is None
        else:
            rank.wait(20)
            assert time.monotonic() - began < 10
            outcome = RankFiles(logs, 0).outcome()
            assert (outcome and outcome["outcome"]) == ("stopped" if flag == "stop" else None)
    finally:
        rank.kill()
        rank.wait()
