"""Regression, multi-label and classes of two texts: one curve at every split, and the metrics of all rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arena import STEPS, Arena
from whole_tensors import whole_tensors

from drumline.plan.model import Plan, read_plan
from drumline.train.batches import open_rows
from drumline.train.models import ModelBuilder
from memory.family_grid import Cell, _trace
from memory.plans import small_plan

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [
    ("fsdp", SPLITS[2]),
    ("accelerate", SPLITS[1]),
    ("zero3", SPLITS[1]),
]
BERT = {"source": "config", "architecture": "bert", "config": {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "regression": {"task": "regression"},
    "two numbers": {"task": "regression", "label_field": "both"},
    "multi_label": {"task": "multi_label", "label_field": "classes"},
    "pairs": {"task": "classification", "text_pair_field": "other", "label_field": "class"},
}


def rows_in(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {"text": "word " * (n % 5 + 1), "other": "again " * (n % 3 + 1), "label": (n * 7 % 11) / 4, "both": [n % 3, -n % 5],
         "classes": [c for c in range(4) if n >> c & 1], "class": n % 2}
        for n in range(41)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan_of(arena: Arena, kind: str, engine: str, split: tuple[int, int, int]) -> Plan:
    data = {
        "path": str(rows_in(arena.folder)),
        "sequence_length": 48,
        "validation": 0.15,
        **KINDS[kind],
    }
    return arena.plan(
        engine, split, model=BERT, data=data, evaluation={"every_steps": 8, "per_device": 2}
    )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("labelled"))
    made.train_kinds(KINDS, RUNS, plan_of, SPLITS[1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_one_curve(arena: Arena, kind: str, run: tuple[str, tuple[int, int, int]]) -> None:
    """Under every engine, to rounding; eight steps learn all but the two classes of pairs."""
    engine, split = run
    found = arena.values(f"{kind}-{engine}-{split}")
    assert len(found) == STEPS
    assert found == pytest.approx(arena.values(f"{kind}-ddp-{SPLITS[0]}"), rel=2e-5, abs=1e-5)
    assert kind == "pairs" or min(found[-3:]) < found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_verification_and_resume(arena: Arena, kind: str) -> None:
    """The step's gradient is that of single rows, the loss is transformers' own; a resume is bitwise."""
    assert arena.verdict(f"verify-{kind}") == (True, True)
    assert arena.own_loss(f"verify-{kind}")
    assert arena.values(f"stopped-{kind}") == arena.values(f"{kind}-ddp-{SPLITS[1]}")


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_all_rows(arena: Arena, kind: str) -> None:
    """Recomputed in one go from the last checkpoint of a run on two ranks."""
    name = f"{kind}-ddp-{SPLITS[2]}"
    plan = read_plan((arena.folder / name / "plan.json").read_text())
    rows = open_rows(plan, "validation")
    model: Any = ModelBuilder(plan.recipe, rows.manifest).whole()
    stored = whole_tensors(arena.folder / name / f"checkpoints/step-{STEPS:08d}", "model.")
    model.load_state_dict(
        {key.removeprefix("model."): value for key, value in stored.items()}, strict=False
    )
    batch = {
        key: torch.from_numpy(np.array(value))
        for key, value in rows.collate(np.arange(len(rows))).items()
    }
    targets = batch.pop("targets")
    with torch.no_grad():
        outputs = model.eval()(**batch).logits
    lines = (arena.folder / name / "metrics.jsonl").read_text().splitlines()
    (found,) = (line for line in map(json.loads, lines) if line["kind"] == "evaluation")
    if "task" in KINDS[kind] and KINDS[kind]["task"] == "regression":
        wanted = {
            "loss": (outputs - targets).square().mean(),
            "mae": (outputs - targets).abs().mean(),
        }
    elif kind == "multi_label":
        said = outputs > 0
        wanted = {
            "loss": torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets),
            "accuracy": (said == (targets > 0)).float().mean(),
            "f1": 2 * (said & (targets > 0)).sum() / (said.sum() + targets.sum()),
        }
    else:
        wanted = {"loss": torch.nn.functional.cross_entropy(outputs, targets),
                  "accuracy": (outputs.argmax(dim=-1) == targets).float().mean()}  # fmt: skip
    for key, value in wanted.items():
        assert found[f"eval/{key}"] == pytest.approx(float(value), rel=1e-4, nan_ok=True), key


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_the_closed_form_is_the_trace(task: str) -> None:
    """Within 0.5 %, as for classes."""
    sections = {"data": {"task": task}}
    plan = small_plan("bert", **sections)
    assert abs(Cell("bert", sections, plan, _trace(plan, "bert")).error) <= 0.005
