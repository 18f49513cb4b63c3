"""Memory of padded rows is that of the longest row that the run reads, which is also what the warm-up runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.recipe.load import merge, validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.session.row_lengths import manifest_of_run
from drumline.session.show import plan_table
from drumline.session.traces import keep_trace, kept_trace
from drumline.trace.rehearse import rehearse
from drumline.train.batches import StepReader, open_rows
from memory.plans import GPT2

TASKS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "ask ", "completion": "w"},
    "classification": {"text": "w", "label": 0},
}


OWN_TASK = """
from drumline.data.tasks import sft
from drumline.recipe.data_section import Data


def build():
    return sft.Sft(Data(source="files", path="x", task="sft", sequence_length=400))
"""


def plan_of(folder: Path, task: str, **changes: Any) -> Plan:
    """Two GPT-2 samples a micro-batch, of rows between 1 and 90 letters, at most 400 tokens."""
    path = folder / f"{task}.jsonl"
    rows = []
    for number in range(90):
        row = {k: v * (number + 1) if v == "w" else v for k, v in TASKS[task].items()}
        rows.append(json.dumps({**row, "label": number % 2} if task == "classification" else row))
    if not path.exists():
        path.write_text("\n".join(rows) + "\n")
    plain = {
        "recipe": "lengths",
        "schema": 1,
        "model": {
            "source": "config",
            "architecture": "gpt2",
            "config": {**GPT2, "vocab_size": 257, "pad_token_id": 0},
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
    plan_of(tmp_path, task)
    known = plan_of(tmp_path, task, duration={"steps": 45})
    short = plan_of(tmp_path, task, data={"sequence_length": longest, "samples": 90})
    full = plan_of(tmp_path, task, data={"sequence_length": 401, "samples": 91})
    assert known.memory.allocated == short.memory.allocated
    assert known.memory.allocated
    assert full.memory.allocated
    assert known.memory.allocated.high < full.memory.allocated.low
    assert f"the longest row of this run has {longest} tokens" in " ".join(
        plan_table(known).split()
    )


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize(("seed", "steps"), [(1, 5), (2, 5), (3, 1), (1, 44), (1, 46)])
def test_a_short_run_needs_what_its_own_rows_need(
    tmp_path: Path, task: str, seed: int, steps: int
) -> None:
    """The order is known before the run, so the plan, the warm-up and the steps have the same widest rows."""
    plan_of(tmp_path, task)
    plan = plan_of(tmp_path, task, seed=seed, duration={"steps": steps})
    reader = StepReader(plan, open_rows(plan, "train"), rank=0)
    widths = [
        batch.tensors["input_ids"].shape[1]
        for number in range(1, steps + 1)
        for batch in reader.read(number).micro_batches
    ]
    assert plan.data.row_tokens == max(widths)
    assert reader.widest().tensors["input_ids"].shape == (2, max(widths))
    assert f"of this run has {max(widths)} tokens" in " ".join(plan_table(plan).split())


@pytest.mark.parametrize("task", list(TASKS))
def test_evaluation_reads_every_validation_row(tmp_path: Path, task: str) -> None:
    """With evaluation its longest row counts too, however short the run is."""
    validation = {"data": {"validation": 0.5}, "duration": {"steps": 1}}
    recipe = plan_of(tmp_path, task).recipe
    prepare_data(validate(merge(recipe.model_dump(by_alias=True), validation), "r"))
    without = plan_of(tmp_path, task, **validation)
    evaluated = plan_of(tmp_path, task, **validation, evaluation={"every_steps": 1})
    lengths = open_rows(evaluated, "validation").column("lengths")
    assert without.data.row_tokens is not None
    assert evaluated.data.row_tokens == max(
        without.data.row_tokens, lengths.max() - (task == "sft")
    )


@pytest.mark.parametrize("task", list(TASKS))
def test_a_trace_is_not_used_again_for_other_rows(tmp_path: Path, task: str) -> None:
    """A kept trace is of rows of one length: another run that reads shorter or longer ones needs its own."""
    plan_of(tmp_path, task)
    short, whole = (plan_of(tmp_path, task, duration={"steps": steps}) for steps in (1, 45))
    assert short.data.row_tokens != whole.data.row_tokens
    keep_trace(short, rehearse(short, manifest_of_run(short)).traced())
    assert kept_trace(short)
    assert kept_trace(whole) is None


def test_rows_of_a_task_of_ones_own_have_an_unknown_length(tmp_path: Path) -> None:
    """What a custom task makes of a row is known to it alone, so no length is said to be the longest."""
    (tmp_path / "own.py").write_text(OWN_TASK)
    plan = plan_of(tmp_path, "sft")
    own = {"data": {"task": "custom", "task_factory": "own:build"}, "project": str(tmp_path)}
    recipe = validate(merge(plan.recipe.model_dump(by_alias=True), own), "r")
    prepare_data(recipe)
    manifest = read_dataset_manifest(Path(str(make_plan(recipe).data.cache)))
    assert manifest
    assert manifest.longest is None


def test_without_a_sequence_length_the_prepared_rows_say_it(tmp_path: Path) -> None:
    """A classifier need not cut its rows: its memory is known from them, and too long ones are refused."""
    stated = plan_of(tmp_path, "classification")
    unset = {"data": {"sequence_length": None}, "duration": {"steps": 45}}
    recipe = validate(merge(stated.recipe.model_dump(by_alias=True), unset), "r")
    assert make_plan(recipe).memory.verdict == "unknown"
    prepare_data(recipe)
    cut = plan_of(tmp_path, "classification", duration={"steps": 45})
    assert make_plan(recipe).memory.allocated == cut.memory.allocated
    few = {"model": {"config": {**recipe.model.config, "n_positions": 89}}}
    with pytest.raises(PlanError, match="not set, and a row has 90 tokens > 89 positions"):
        make_plan(validate(merge(recipe.model_dump(by_alias=True), few), "r"))
