"""The recipes that ship: each stands in the docs as it plans, and those for a CPU train."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from advice import command
from conftest import ROOT
from drumline.recipe import catalogue
from drumline.recipe.load import load_recipe

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

ON_CPU = [name for name in catalogue.names() if load_recipe(name).cluster.gpu == "cpu"]
LEARNS: dict[str, tuple[list[str], str, float]] = {
    "chat-sft": ([], "eval/loss", 0.5),
    "chat-lora": ([], "eval/loss", 0.6),
    "chat-qlora": ([], "eval/loss", 0.6),
    "tiny-classifier": ([], "eval/loss", 0.3),
    "tiny-regression": ([], "eval/mae", 0.3),
    "tiny-multi-label": ([], "eval/loss", 0.2),
    "tiny-dpo": ([], "eval/loss", 0.1),
    "tiny-kto": ([], "eval/loss", 0.2),
    "tiny-names": (["duration.steps=80", "evaluation.every_steps=40"], "eval/loss", 0.1),
    "tiny-masked": (["duration.steps=100", "evaluation.every_steps=50"], "eval/loss", 2.4),
    "tiny-t5": (["duration.steps=100", "evaluation.every_steps=50"], "eval/loss", 0.4),
    "tiny-vit": (["duration.steps=100", "evaluation.every_steps=50"], "eval/loss", 0.9),
    "tiny-whisper": (["duration.steps=40", "evaluation.every_steps=20"], "eval/loss", 1.5),
    "tiny-llava": ([], "eval/loss", 0.8),
    "tiny-mixture": (["duration.steps=40", "evaluation.every_steps=20"], "eval/reviews/loss", 3.3),
    "tiny-continue": (["duration.steps=40", "--from", "base"], "eval/loss", 2.7),
}  # fmt: skip
"""Options, and what the last evaluation must be below: most of them are run to the end, as people would."""
SHORT = [
    "duration={steps: 6, epochs: null}",
    "schedule.horizon_steps=1000",
    "evaluation.every_steps=5",
]


def rows_of_docs() -> dict[str, tuple[str, str]]:
    """Equation and memory of each recipe in docs/recipes.md."""
    text = (ROOT / "docs/recipes.md").read_text()
    found = re.findall(r"^\| `(.+?)` \| .+? \| (.+?) \| (.+?) \| .+? \|$", text, flags=re.MULTILINE)
    return {name: (equation, memory) for name, equation, memory in found}


def test_the_docs_list_every_recipe_as_it_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation and memory are those that `drumline recipes` prints before any data are prepared."""
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "none"))
    printed = {}
    for line in command("recipes").out.splitlines():
        match = re.match(r"(\S+)\s+([\d,]+ = .*?)  \((.*)\)$", line)
        assert match, line
        printed[match[1]] = (match[2], match[3])
    assert rows_of_docs() == printed


@pytest.mark.parametrize("name", [name for name in ON_CPU if name not in (*LEARNS, "tiny-code-lm")])
def test_a_recipe_for_a_cpu_trains(forked: Any, name: str) -> None:
    """A few steps of each; `tiny-code-lm` is run to the end by test_demo.py."""
    done = forked("run", name, *SHORT, "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6


@pytest.mark.parametrize("name", LEARNS)
def test_a_demo_learns(tmp_path: Path, forked: Any, name: str) -> None:
    """Its evaluation ends where the docs say that it does."""
    options, metric, below = LEARNS[name]
    if "base" in options:
        words = (
            "duration.steps=30",
            "schedule.warmup_steps=5",
            "evaluation=null",
            "data.validation=0",
        )
        assert forked("run", "tiny-code-lm", *words, "--run-dir", "base").returncode == 0
    done = forked("run", name, *options, "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["eval"][metric] < below
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if metric in line)
    assert found["eval"][metric] < first[metric]
    if name == "tiny-classifier":
        assert found["eval"]["eval/accuracy"] > 0.97
