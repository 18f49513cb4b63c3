"""An objective, a row format, an optimizer and an edit of the model, added from outside and trained at any split.

tests/seams holds all of it: a recipe and the project's own Python. Nothing of the product is touched.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from conftest import ROOT
from drumline.metrics_file import read_metrics

RECIPE = str(ROOT / "tests/seams/additions.yaml")
FREEZE_ALL = "def freeze_all(model):\n    model.requires_grad_(False)\n"
SPLITS = {
    "whole": ["batch.per_device=8", "batch.gpus=1", "batch.accumulation=1"],
    "accumulated": ["batch.per_device=1", "batch.gpus=1", "batch.accumulation=8"],
    "ranks": ["batch.per_device=2", "batch.gpus=2", "batch.accumulation=2"],
}
ENGINES = {
    "torchrun": [],
    "fsdp": ["strategy.name=fsdp"],
    "accelerate": ["launch.launcher=accelerate"],
    "zero2": ["launch.launcher=deepspeed", "strategy.name=zero2"],
    "zero3": ["launch.launcher=deepspeed", "strategy.name=zero3"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, module_drumline: Any) -> Path:
    """The undivided batch on one process."""
    folder = tmp_path_factory.mktemp("seams")
    done = module_drumline(folder, "run", RECIPE, *SPLITS["whole"], "--run-dir", "whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


@pytest.mark.parametrize(
    ("engine", "split"),
    [("torchrun", "accumulated"), *((engine, "ranks") for engine in ENGINES)],
)
def test_additions_train_alike(
    drumline: Any, tmp_path: Path, reference: Path, engine: str, split: str
) -> None:
    """The same losses, evaluation and frozen weights under every engine and split as of the whole batch."""
    done = drumline("run", RECIPE, *SPLITS[split], *ENGINES[engine], "--run-dir", "r", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert losses(tmp_path / "r") == pytest.approx(losses(reference), rel=2e-5)
    evaluated = [
        [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"]
        for run in (tmp_path / "r", reference)
    ]
    assert set(found["eval"]) == {"eval/loss", "eval/near"}
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    names = set()
    for path in (tmp_path / "r/checkpoints/step-00000012").glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names |= set(file.keys())
    assert {"model.embedding.weight", "optimizer.second.weight.mean"} <= names
    assert not [name for name in names if name.startswith("optimizer.embedding")]


@pytest.mark.parametrize("engine", ["fsdp", "accelerate", "zero2"])
def test_verify_finds_them_equal(drumline: Any, engine: str) -> None:
    """The gradient of the split is the undivided batch's, one row at a time in fp64."""
    done = drumline("verify", RECIPE, *SPLITS["ranks"], *ENGINES[engine], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["equal"]


def test_they_are_under_the_trust_rule(drumline: Any, tmp_path: Path, reference: Path) -> None:
    """Out of a record none of them runs unless it is trusted; then it is reproduced, at another split."""
    done = drumline("reproduce", str(reference))
    assert done.returncode == 2
    for name in ("bag", "freeze_embeddings", "rows", "pairs", "distance", "sign_sgd"):
        assert f"additions:{name}" in done.stderr
    done = drumline(
        "reproduce", str(reference), "--trust-code", "--gpus", "2", "--json", "--run-dir", "again"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "equal"


def test_nothing_to_train_is_refused(drumline: Any, tmp_path: Path) -> None:
    """An edit that freezes everything is one message and exit 2, not a run that learns nothing."""
    for name in ("additions.py", "helpers.py"):
        shutil.copy(ROOT / "tests/seams" / name, tmp_path)
    (tmp_path / "frozen.py").write_text(FREEZE_ALL)
    recipe = Path(RECIPE).read_text().replace("additions:freeze_embeddings", "frozen:freeze_all")
    (tmp_path / "r.yaml").write_text(recipe)
    done = drumline("run", "r.yaml", *SPLITS["whole"])
    assert done.returncode == 2, done.stderr
    assert "model: no parameter is trainable" in done.stderr


def test_a_task_that_stores_nothing_known_is_refused(drumline: Any, tmp_path: Path) -> None:
    """A factory that makes something else is named, with what it lacks."""
    (tmp_path / "mine.py").write_text("def task():\n    return object()\n")
    (tmp_path / "r.yaml").write_text(
        Path(RECIPE).read_text().replace("additions:pairs", "mine:task")
        .replace("additions:rows", "mine:rows").replace("additions:bag", "mine:bag")
    )  # fmt: skip
    done = drumline("prepare", "r.yaml")
    assert done.returncode == 2
    assert "data.task_factory: mine:task made a object without encode()" in done.stderr
