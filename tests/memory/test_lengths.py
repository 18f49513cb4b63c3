"""Memory of padded rows is that of the longest prepared row, which is also what the warm-up runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from drumline.plan.model import Plan
from drumline.recipe.load import merge, validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.session.show import plan_table
from drumline.train.batches import StepReader, open_rows
from memory.plans import GPT2

TASKS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "ask ", "completion": "w"},
    "classification": {"text": "w", "label": 0},
}


def plan_of(folder: Path, task: str, **changes: Any) -> Plan:
    """Two GPT-2 samples a micro-batch, of rows between 1 and 90 letters, at most 400 tokens."""
    path = folder / f"{task}.jsonl"
    rows = []
    for number in range(90):
        row = {k: v * (number + 1) if v == "w" else v for k, v in TASKS[task].items()}
        rows.append(json.dumps({**row, "label": number % 2} if task == "classification" else row))
    path.write_text("\n".join(rows) + "\n")
    plain = {
        "recipe": "lengths",
        "schema": 1,
        "model": {
            "source": "config",
            "architecture": "gpt2",
            "config": {**GPT2, "vocab_size": 257},
        },
        "data": {"source": "files", "path": str(path), "task": task, "sequence_length": 400},
        "batch": {"per_device": 2, "gpus": 1, "accumulation": 1},
        "cluster": {"gpu": "h100-80gb"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "duration": {"steps": 5},
    }
    recipe = validate(merge(plain, changes), "r")
    if not changes:
        prepare_data(recipe)
    return make_plan(recipe)


@pytest.mark.parametrize(("task", "longest"), [("sft", 94), ("classification", 90)])
def test_memory_is_that_of_the_longest_row(tmp_path: Path, task: str, longest: int) -> None:
    """As if sequence_length were the longest row, less its last target; the plan says which row it was."""
    known = plan_of(tmp_path, task)
    short = plan_of(tmp_path, task, data={"sequence_length": longest, "samples": 90})
    full = plan_of(tmp_path, task, data={"sequence_length": 400, "samples": 91})
    assert known.memory.allocated == short.memory.allocated
    assert known.memory.allocated
    assert full.memory.allocated
    assert known.memory.allocated.high < full.memory.allocated.low
    assert f"the longest prepared row has {longest} tokens" in " ".join(plan_table(known).split())


@pytest.mark.parametrize(("task", "longest"), [("sft", 94), ("classification", 90)])
def test_the_warm_up_has_the_shape_of_the_plan(tmp_path: Path, task: str, longest: int) -> None:
    """The widest micro-batch of the warm-up is as wide as the longest row, and no step is wider."""
    plan = plan_of(tmp_path, task)
    reader = StepReader(plan, open_rows(plan, "train"), rank=0)
    assert reader.widest().tensors["input_ids"].shape == (2, longest)
    for number in range(1, 6):
        for batch in reader.read(number).micro_batches:
            assert batch.tensors["input_ids"].shape[1] <= longest
