"""Training on a real Slurm: submitted, warned, killed, preempted, split over other nodes, refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from lab import Lab, wait, why_not

from toolkit.metrics_file import read_metrics
from toolkit.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]

TEXT = ["data.options={max_files: 40}", "data.validation=0.0", "evaluation=null", "schedule.warmup_steps=2",
        "batch.effective=12", "batch.per_device=3", "batch.gpus=4", "batch.accumulation=1", "logging.every_steps=1",
        "cluster.gpus_per_node=2"]  # fmt: skip
SITE = {
    "site": "lab",
    "partition": "batch",
    "cpus_per_node": 2,
    "time_limit": "00:10:00",
    "warning_s": 60,
}


class Desk:
    """A user's folder on a login node of the lab."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.site()

    def site(self, **changes: Any) -> None:
        """Write site.yaml."""
        (self.folder / "site.yaml").write_text(
            yaml12.dump({**SITE, "cache": os.environ["DRUMLINE_CACHE"], **changes})
        )

    def drumline(
        self, *arguments: str, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The real command; asserts its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "toolkit.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.lab.environment, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == code, done.stderr
        return done

    def submit(
        self,
        *overrides: str,
        name: str = "r",
        code: int = 0,
        recipe: str = "tiny-code-lm",
        options: Any = (),
    ) -> str:
        """The job's id."""
        done = self.drumline("submit", recipe, *TEXT, *overrides, "--to", "slurm", "--site", "site.yaml", "--run-dir", name,
                             "--json", *options, code=code)  # fmt: skip
        return json.loads(done.stdout)["jobs"][-1] if code == 0 else done.stderr

    def record(self, name: str = "r") -> dict[str, Any]:
        return json.loads((self.folder / name / "record.json").read_text())  # type: ignore[no-any-return]

    def attempts(self, name: str = "r") -> list[dict[str, Any]]:
        return self.record(name)["attempts"]  # type: ignore[no-any-return]

    def steps(self, name: str = "r") -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if "lr" in line]

    def numbers(self, name: str = "r") -> list[tuple[Any, ...]]:
        return [
            tuple(line[k] for k in ("step", "loss", "lr", "digest", "grad_norm"))
            for line in self.steps(name)
        ]

    def wait_for_step(self, step: int, name: str = "r") -> None:
        wait(lambda: (lines := self.steps(name)) and lines[-1]["step"] >= step, 120)

    def wait_for_job(self, job: str, *states: str, seconds: float = 150) -> None:
        try:
            wait(lambda: self.lab.job(job).get("JobState") in (states or ("COMPLETED",)), seconds)
        except AssertionError:
            logs = [path.read_text() for path in sorted(self.folder.glob("*/logs/*.log"))]
            raise AssertionError(f"{self.lab.job(job)}\n" + "\n".join(logs)[-4000:]) from None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Four nodes, started and stopped here; a skip with the reason where Slurm cannot run."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("slurm")
    lab = Lab(folder / "lab")
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture
def desk(slurm: Lab, tmp_path: Path) -> Desk:
    return Desk(slurm, tmp_path)


@pytest.fixture(scope="module")
def straight(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Forty steps on two nodes of two ranks, undisturbed."""
    made = Desk(slurm, tmp_path_factory.mktemp("straight"))
    job = made.submit("duration.steps=40", "checkpoint.every_steps=10")
    made.wait_for_job(job)
    return made


def test_two_nodes_of_two_ranks(straight: Desk) -> None:
    """COMPLETED; the metrics and weights are those of four ranks on this machine without Slurm."""
    (attempt,) = straight.attempts()
    assert attempt["outcome"] == "finished"
    assert "start in job" in attempt["cause"]
    assert attempt["command"][0] == "srun"
    assert attempt["split"] == {"per_device": 3, "gpus": 4, "accumulation": 1}
    straight.drumline(
        "run",
        "tiny-code-lm",
        *TEXT[:-1],
        "duration.steps=40",
        "checkpoint.every_steps=10",
        "--run-dir",
        "here",
    )
    assert straight.numbers() == straight.numbers("here")
    assert straight.record()["weights"] == straight.record("here")["weights"]
    status = json.loads(straight.drumline("status", "r", "--json").stdout)
    assert (status["state"], status["step"], status["jobs"][0]["state"]) == (
        "finished",
        40,
        "COMPLETED",
    )
    assert "finished at step 40" in straight.drumline("logs", "r").stdout


def test_warned_before_the_time_limit_it_goes_on_and_is_bitwise_the_same(
    straight: Desk, desk: Desk
) -> None:
    """USR1 to the script: saved on all ranks, requeued once, finished in the same folder."""
    job = desk.submit("duration.steps=40", "checkpoint.every_steps=10")
    desk.wait_for_step(5)
    desk.lab.ask("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: len(desk.attempts()) == 2, 120)
    desk.wait_for_job(job)
    first, second = desk.attempts()
    assert first["outcome"] == "stopped"
    assert second["outcome"] == "finished"
    assert second["from_step"] == first["step"]
    assert desk.lab.job(job)["Restarts"] == "1"
    assert desk.record()["weights"] == straight.record()["weights"]
    assert desk.numbers() == straight.numbers()
