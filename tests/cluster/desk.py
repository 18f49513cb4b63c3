"""A user of the lab: a folder with a recipe and a site file, and the real commands."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lab import Lab, wait

from conftest import SOURCES, tiny_recipe
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12

FOUR = ["batch.per_device=3", "batch.gpus=4", "cluster.gpus_per_node=2"]
"""Two nodes of two ranks."""
ALONE = ["batch.gpus=1", "batch.per_device=12"]

SITE = {
    "site": "lab",
    "partition": "batch",
    "cpus_per_node": 2,
    "time_limit": "00:10:00",
    "warning_s": 60,
}


def write_recipe(folder: Path, body: str = "        time.sleep(0.15)") -> str:
    """Two nodes of one rank; a model that does something at each forward, by default takes its time."""
    (folder / "strange.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom torch import nn\n\n\nclass Strange(nn.Sequential):\n"
        f"    seen = 0\n\n    def forward(self, x):\n        self.seen += 1\n{body}\n        return super().forward(x)\n\n\n"
        "def make(features, hidden, classes):\n"
        "    return Strange(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, classes))\n"
    )
    recipe = tiny_recipe(project=".", model={"factory": "strange:make"}, duration={"steps": 40},
                         batch={"effective": 12, "per_device": 6, "gpus": 2}, cluster={"gpus_per_node": 1},
                         checkpoint={"every_steps": 10}, logging={"every_steps": 1},
                         schedule={"name": "cosine", "warmup_steps": 3})  # fmt: skip
    (folder / "r.yaml").write_text(yaml12.dump(recipe))
    return "r.yaml"


class Desk:
    """A user's folder on a login node of the lab."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.jobs: dict[str, str] = {}
        self.site()
        write_recipe(folder)

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
            [sys.executable, "-m", "drumline.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.lab.environment, "PYTHONPATH": SOURCES, **environment},
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
        options: Any = (),
    ) -> str:
        """The job's id."""
        done = self.drumline("submit", "r.yaml", *overrides, "--to", "slurm", "--site", "site.yaml", "--run-dir", name,
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

    def bring_back(self, nodes: Collection[str]) -> None:
        """Start nodes that were lost, and wait until they take jobs; no job runs meanwhile.

        Slurm 22.05 may count the CPUs of a job that it requeued from a lost node as used for minutes; reading
        its configuration anew, it counts those of running jobs only.
        """
        for node in nodes:
            for state in ("DOWN", "RESUME"):
                self.lab.ask(
                    "scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=lost"
                )
            self.lab.start_node(node)
        self.lab.ask("scontrol", "reconfigure")
        seen: list[str] = []

        def are_idle() -> bool:
            listed = self.lab.ask(
                "sinfo", "-h", "-N", "-n", ",".join(nodes), "-p", "batch", "-o", "%N=%t"
            )
            seen.append(" ".join(sorted(set(listed.split()))))
            return seen[-1] == " ".join(f"{node}=idle" for node in sorted(nodes))

        try:
            wait(are_idle, 60)
        except AssertionError:
            raise AssertionError(f"nodes stay {' · '.join(dict.fromkeys(seen))}") from None

    def wait_for_job(self, job: str, *states: str, seconds: float = 150) -> None:
        try:
            wait(lambda: self.lab.job(job).get("JobState") in (states or ("COMPLETED",)), seconds)
        except AssertionError:
            logs = [path.read_text() for path in sorted(self.folder.glob("*/logs/*.log"))]
            raise AssertionError(f"{self.lab.job(job)}\n" + "\n".join(logs)[-4000:]) from None
