"""Trains plans under every engine, all jobs of a world size in one start of its ranks."""

import json
from pathlib import Path
from typing import Any

from ranks import run_jobs
from unequal import unequal_plan, write_pairs

from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": {"name": "fsdp"}},
    "accelerate": {"launch": {"launcher": "accelerate"}},
    "accelerate-fsdp": {"launch": {"launcher": "accelerate"}, "strategy": {"name": "fsdp"}},
    "zero0": {"launch": {"launcher": "deepspeed"}},
    "zero1": {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero1"}},
    "zero2": {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero2"}},
    "zero3": {"launch": {"launcher": "deepspeed"}, "strategy": {"name": "zero3"}},
    "zero2-offload": {
        "launch": {"launcher": "deepspeed"},
        "strategy": {"name": "zero2", "offload": "optimizer"},
    },
}
STEPS = 8


class Arena:
    """Jobs by world size, done in one start each; their folders by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_pairs(folder)
        self._jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        self._round = 0

    def plan(self, engine: str, split: tuple[int, int, int], **changes: Any) -> Plan:
        """Eight steps under an engine, saved at every second."""
        base = {"duration": {"steps": STEPS}, "checkpoint": {"every_steps": 2, "keep_last": 9},
                "logging": {"every_steps": 1}, **ENGINES[engine]}  # fmt: skip
        return unequal_plan(self.data, split, **{**base, **changes})

    def ask(self, kind: str, name: str, plan: Plan, **options: Any) -> None:
        """A job of ranks.py in a folder that may hold checkpoints already."""
        where = self.folder / name
        where.mkdir(parents=True, exist_ok=True)
        (where / "plan.json").write_text(plan.to_json())
        job = {"kind": kind, "plan": str(where / "plan.json"), "folder": str(where), **options}
        self._jobs[plan.batch.gpus].append(job)

    def go(self) -> None:
        """Do what has been asked for."""
        self._round += 1
        for world, jobs in self._jobs.items():
            if jobs:
                run_jobs(world, jobs, self.folder / f"ranks-{self._round}-{world}")
                jobs.clear()

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Its steps."""
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if "lr" in line]

    def verdict(self, name: str) -> tuple[bool, bool]:
        """Whether verification found the gradients and the rates equal."""
        report = json.loads((self.folder / name / "verify.json").read_text())
        gradients = all(step["relative_error"] <= report["tolerance"] for step in report["steps"])
        rates = all(taken == rate["wanted"] for rate in report["rates"] for taken in rate["taken"])
        return gradients and bool(report["steps"]), rates

    def own_loss(self, name: str) -> bool:
        """Whether verification found the model's own loss equal to ours."""
        report = json.loads((self.folder / name / "verify.json").read_text())
        return bool(report["own_loss"]["relative_error"] <= report["tolerance"])
