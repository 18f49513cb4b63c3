"""Trains plans under every engine, all jobs of a world size in one start of its ranks."""

import json
from collections.abc import Callable, Iterable
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

Split = tuple[int, int, int]
Run = tuple[str, Split]
"""An engine, and a split."""


SPLITS: list[Split] = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
PARITY: list[Run] = [
    *(("ddp", split) for split in SPLITS),
    ("fsdp", SPLITS[1]),
    ("accelerate", SPLITS[1]),
    ("zero2", SPLITS[1]),
    ("zero3", SPLITS[1]),
]
"""Every engine, and every split, for what engines do not know of; all of both are in test_engines.py."""


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

    def train_kinds(
        self,
        kinds: Iterable[str],
        runs: Iterable[Run],
        plan_of: Callable[["Arena", str, str, Split], Plan],
        split: Split,
    ) -> None:
        """Train each kind in all these runs, verify it under FSDP2, and stop and resume it under DDP.

        The jobs are called KIND-ENGINE-SPLIT, verify-KIND and stopped-KIND; `split`: of the last two.
        """
        for kind in kinds:
            for engine, one in runs:
                self.ask("train", f"{kind}-{engine}-{one}", plan_of(self, kind, engine, one))
            self.ask("verify", f"verify-{kind}", plan_of(self, kind, "fsdp", split), fault="")
            self.ask("train", f"stopped-{kind}", plan_of(self, kind, "ddp", split), stop_after=5)
        self.go()
        for kind in kinds:
            self.ask("train", f"stopped-{kind}", plan_of(self, kind, "ddp", split))
        self.go()

    def values(self, name: str, key: str = "loss") -> list[float]:
        """One value of each step."""
        return [line[key] for line in self.lines(name)]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Its steps."""
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if "lr" in line]

    def curve(self, name: str, *metrics: str) -> list[dict[str, Any]]:
        """Losses and these metrics of its steps and evaluations, in order; other lines are left out."""
        kept = {"loss", "eval/loss", *(f"eval/{metric}" for metric in metrics)}
        lines = read_metrics(self.folder / name / "metrics.jsonl")
        return [
            {key: line[key] for key in line.keys() & kept} for line in lines if line.keys() & kept
        ]

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
