"""An objective, a row format, an optimizer and an edit of the model, added from outside and trained at any split.

tests/seams holds all of it: a recipe and the project's own Python. Nothing of the product is touched.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_jobs
from safetensors import safe_open

from conftest import ROOT
from drumline.metrics_file import read_metrics
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data

pytestmark = pytest.mark.xdist_group("matrix")

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
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every engine at every split, and `verify` at the last one; one start for each number of ranks."""
    folder = tmp_path_factory.mktemp("seams")
    prepare_data(load_recipe(RECIPE, SPLITS["whole"]))
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for engine, chosen in ENGINES.items():
        for split, batch in SPLITS.items():
            plan = make_plan(load_recipe(RECIPE, [*batch, *chosen]))
            kinds = ["train", *(["verify"] if split == "ranks" else [])]
            for kind in kinds:
                where = folder / f"{kind}-{engine}-{split}"
                where.mkdir()
                (where / "plan.json").write_text(plan.to_json())
                job = {"kind": kind, "plan": str(where / "plan.json"), "folder": str(where)}
                job |= {"fault": ""} if kind == "verify" else {}
                jobs[plan.mesh.ranks].append(job)
    for world, theirs in jobs.items():
        run_jobs(world, theirs, folder / f"ranks-{world}")
    return folder


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_additions_train_alike(trained: Path, engine: str, split: str) -> None:
    """The same losses, evaluation and frozen weights under every engine and split as of the whole batch."""
    run, reference = trained / f"train-{engine}-{split}", trained / "train-torchrun-whole"
    ours, theirs = ([line["loss"] for line in lines(path, "step")] for path in (run, reference))
    assert len(ours) == 12
    assert ours == pytest.approx(theirs, rel=2e-5)
    evaluated = [lines(path, "evaluation") for path in (run, reference)]
    assert set(evaluated[0][-1]) == {"kind", "step", "eval/loss", "eval/near"}
    for mine, other in zip(*evaluated, strict=True):
        assert mine == pytest.approx(other, rel=2e-5)
    names = set()
    for path in (run / "checkpoints/step-00000012").glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names |= set(file.keys())
    assert {"model.embedding.weight", "optimizer.second.weight.mean"} <= names
    assert not [name for name in names if name.startswith("optimizer.embedding")]


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_finds_them_equal(trained: Path, engine: str) -> None:
    """The gradient of the split is the undivided batch's, one row at a time in fp64."""
    report = json.loads((trained / f"verify-{engine}-ranks/verify.json").read_text())
    assert report["steps"]
    assert report["rates"]
    assert all(step["relative_error"] <= report["tolerance"] for step in report["steps"])
    assert all(taken == rate["wanted"] for rate in report["rates"] for taken in rate["taken"])


def test_they_are_under_the_trust_rule(forked: Any) -> None:
    """Out of a record none of them runs unless it is trusted; then it is reproduced, at another split."""
    done = forked("run", RECIPE, *SPLITS["whole"], "--run-dir", "whole")
    assert done.returncode == 0, done.stderr
    done = forked("reproduce", "whole")
    assert done.returncode == 2
    for name in ("bag", "freeze_embeddings", "rows", "pairs", "distance", "sign_sgd"):
        assert f"additions:{name}" in done.stderr
    words = ("--trust-code", "--gpus", "2", "--json", "--run-dir", "again")
    done = forked("reproduce", "whole", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "equal"


def test_nothing_to_train_is_refused(forked: Any, tmp_path: Path) -> None:
    """An edit that freezes everything is one message and exit 2, not a run that learns nothing."""
    for name in ("additions.py", "helpers.py"):
        shutil.copy(ROOT / "tests/seams" / name, tmp_path)
    (tmp_path / "frozen.py").write_text(FREEZE_ALL)
    recipe = Path(RECIPE).read_text().replace("additions:freeze_embeddings", "frozen:freeze_all")
    (tmp_path / "r.yaml").write_text(recipe)
    done = forked("run", "r.yaml", *SPLITS["whole"])
    assert done.returncode == 2, done.stderr
    assert "model: no parameter is trainable" in done.stderr


def test_a_task_that_stores_nothing_known_is_refused(forked: Any, tmp_path: Path) -> None:
    """A factory that makes something else is named, with what it lacks."""
    (tmp_path / "mine.py").write_text("def task():\n    return object()\n")
    (tmp_path / "r.yaml").write_text(
        Path(RECIPE).read_text().replace("additions:pairs", "mine:task")
        .replace("additions:rows", "mine:rows").replace("additions:bag", "mine:bag")
    )  # fmt: skip
    done = forked("prepare", "r.yaml")
    assert done.returncode == 2
    assert "data.task_factory: mine:task made a object without encode()" in done.stderr
