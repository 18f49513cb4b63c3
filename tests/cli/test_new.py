"""`drumline new`: a few answers become a recipe that plans, with the fastest split that fits."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from advice import command, heard, worked
from conftest import SOURCES
from drumline.plan.advise import with_change
from drumline.plan.fastest import _changes, fastest_that_fits
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.step_time import gpu_seconds
from drumline.recipe.load import load_recipe
from drumline.session.new_recipe import METHODS, Wish, new_recipe
from drumline.session.planning import make_plan, world_of

ROWS: dict[str, dict[str, Any]] = {
    "sft": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "classification": {"text": "a", "label": 1},
    "causal_lm": {"text": "a"},
}


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task, row in ROWS.items():
        Path(f"{task}.jsonl").write_text(json.dumps(row) + "\n")


def planned(**wish: Any) -> tuple[str, Plan]:
    found = new_recipe(
        Wish(
            **{
                "model": "meta-llama/Llama-3.2-1B",
                "data": "sft.jsonl",
                "gpus": 8,
                "gpu": "h100-80gb",
                **wish,
            }
        )
    )
    Path("made.yaml").write_text(found.text)
    return found.text, make_plan(load_recipe("made.yaml", ["data.samples=100000"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ROWS)
def test_it_plans_for_each_kind_of_rows_and_method(task: str, method: str) -> None:
    """The task is that of the first row; the equation holds, and it fits."""
    model = (
        "google-bert/bert-base-uncased" if task == "classification" else "meta-llama/Llama-3.2-1B"
    )
    if task == "classification" and method == "qlora":
        pytest.skip("covered by the language models; a small encoder gains nothing from 4 bits")
    _, plan = planned(model=model, data=f"{task}.jsonl", method=method, gpus=2, gpu="l4")
    assert plan.recipe.data.task == task
    assert plan.recipe.model.quantization == ("nf4" if method == "qlora" else "none")
    assert (plan.recipe.model.adapter is None) == (method == "full")
    assert plan.batch.effective == plan.batch.per_device * 2 * plan.batch.accumulation
    assert plan.memory.verdict == "fits"


@pytest.mark.parametrize(
    ("model", "gpus", "gpu"),
    [
        ("meta-llama/Llama-3.1-8B", 8, "h100-80gb"),
        (
            "Qwen/Qwen2.5-3B",
            8,
            "l40s",
        ),  # a slow link, for which weights are kept or gradients reduced once
        ("gpt2", 1, "t4"),
    ],
)
def test_no_split_that_fits_is_faster(model: str, gpus: int, gpu: str) -> None:
    """Every candidate is planned again here, and compared by the estimate of time."""
    _, plan = planned(model=model, gpus=gpus, gpu=gpu, sequence_length=1024)
    world = world_of(plan)
    shape = shape_of(plan.recipe, world)
    assert not isinstance(shape, str)
    mine = gpu_seconds(plan, shape)
    others = [
        resolve(with_change(plan.recipe, change), world, is_candidate=True)
        for change in _changes(plan, shape)
    ]
    fitting = [gpu_seconds(other, shape) for other in others if other.memory.verdict == "fits"]
    assert fitting
    assert mine == pytest.approx(min(fitting), rel=2e-3)
    assert plan.memory.verdict == "fits"
    assert plan.recipe.precision == ("fp16" if gpu == "t4" else "bf16")
    strategy = plan.recipe.strategy
    keeps = strategy.reshard != "forward" or strategy.reduce == "step"
    assert keeps == (gpu == "l40s"), strategy


def test_names_of_cards_folders_and_files_as_people_write_them() -> None:
    """A card without bf16 by another of its names; the first table of a folder; a file's name that no recipe can have."""
    Path("rows").mkdir()
    Path("rows/a.bin").write_bytes(b"\0")
    Path("rows/b.jsonl").write_text(Path("sft.jsonl").read_text())
    _, plan = planned(data="rows", gpu="V100 32GB", gpus=1, model="gpt2", name="My Run")
    assert (plan.recipe.precision, plan.recipe.data.task, plan.recipe.recipe) == (
        "fp16",
        "sft",
        "my-run",
    )
    assert planned(gpu="rtx4090", gpus=1, model="gpt2")[1].recipe.precision == "bf16"


def test_rows_at_hand_are_counted_and_measured() -> None:
    """Rows decide how many steps there are, and short ones what a row's length and so the split are."""
    short = [{"prompt": "why? " * (n % 7), "completion": "so " * (n % 50)} for n in range(25_000)]
    Path("short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * 90_000, "completion": "y"}) + "\n")
    Path("text.jsonl").write_text(json.dumps({"text": "word " * 3000}) * 1 + "\n")
    found = {}
    for name in ("short", "long", "text"):
        words = (
            "--model",
            "gpt2",
            "--method",
            "full",
            "--gpus",
            "2",
            "--gpu",
            "l4",
            "--to",
            f"{name}-recipe.yaml",
        )
        done = worked("new", "--data", f"{name}.jsonl", *words)
        found[name] = load_recipe(f"{name}-recipe.yaml"), done.out
    recipe, told = found["short"]
    assert recipe.data.sequence_length == 128
    assert recipe.batch.per_device and recipe.batch.per_device >= 16
    samples = int(re.search(r"As if an epoch had ([\d,]+) samples", told)[1].replace(",", ""))  # type: ignore[index]
    assert samples == pytest.approx(25_000 * 0.98, rel=0.01)
    recipe, told = found["long"]
    assert recipe.data.sequence_length == 1024  # all the positions of gpt2
    assert recipe.data.validation == 0.5
    assert "99 % of the rows have up to about 30," in told
    assert (
        "As if an epoch had 2 samples" in found["text"][1]
    )  # of 15,000 bytes, half of them to evaluate


def test_what_fits_nowhere_is_said() -> None:
    found = new_recipe(Wish("meta-llama/Llama-2-70b-hf", "sft.jsonl", 1, "l4"))
    assert found.is_split_chosen is False
    done = command("new", "--model", "meta-llama/Llama-2-70b-hf", "--data", "sft.jsonl", "--method", "full",
                   "--gpus", "1", "--gpu", "l4", "--to", "large.yaml")  # fmt: skip
    assert done.code == 3
    assert Path("large.yaml").exists()
    assert "no split of this training is known to fit on these GPUs" in done.err
    assert "no split of this training is known to fit" in found.text
    plan = make_plan(load_recipe("llama-8b-8xh100"))
    assert fastest_that_fits(plan, world_of(plan))


def test_the_command_writes_plans_and_overwrites_nothing() -> None:
    words = [
        "new",
        "--model",
        "gpt2",
        "--data",
        "causal_lm.jsonl",
        "--method",
        "full",
        "--gpus",
        "2",
        "--gpu",
        "l4",
        "--epochs",
        "2",
    ]
    done = command(*words, "--to", "mine.yaml")
    assert done.code == 0
    assert re.search(r"64 = \d+ per_device × 2 gpus × \d+ accumulation", done.out)
    assert load_recipe("mine.yaml").duration.epochs == 2
    assert Path("recipe.schema.json").exists()
    again = command(*words, "--to", "mine.yaml")
    assert again.code == 2
    heard("exists and would be overwritten. Nearest: --to another.yaml", again.err)


def test_what_it_cannot_write_is_told() -> None:
    """One message each, with what to say instead; no file is left."""
    Path("odd.jsonl").write_text('{"q": 1}\n')
    model, rest = ["--model", "gpt2"], ["--gpus", "1", "--gpu", "l4"]

    def told(*words: str) -> str:
        done = command("new", *model, *words)
        assert done.code == 2
        assert not list(Path().glob("*.yaml"))
        return done.err

    asked = told()
    assert "missing: --data … --method … --gpus … --gpu …" in asked
    heard("drumline new asks on a terminal only", asked)
    heard(
        "so --task has to say what they are. Nearest: --task sft",
        told("--data", "no/set", "--method", "full", *rest),
    )
    heard(
        "of no task that is known by its columns. Nearest: --task sft",
        told("--data", "odd.jsonl", "--method", "full", *rest),
    )
    heard(
        "choose from full, lora, qlora. Nearest: lora",
        told("--data", "sft.jsonl", "--method", "dora", *rest),
    )
    heard(
        "seq2seq. Nearest: sft",
        told("--data", "sft.jsonl", "--method", "full", "--task", "chat", *rest),
    )
    assert (
        command(
            "new", *model, "--data", "sft.jsonl", "--method", "lora", "--task", "sft", *rest
        ).code
        == 0
    )


def test_it_asks_on_a_terminal() -> None:
    """A real pseudo-terminal: the five questions, two of them answered by Enter."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "drumline.cli", "new", "--to", "asked.yaml"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": SOURCES},
    )  # fmt: skip
    os.close(theirs)
    for answer in ("gpt2", "sft.jsonl", "lora", "", "l4"):
        os.write(ours, f"{answer}\n".encode())
        time.sleep(0.1)
    out, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0, err
    recipe = load_recipe("asked.yaml")
    assert (recipe.model.name, recipe.batch.gpus, recipe.cluster.gpu) == ("gpt2", 8, "l4")
    assert recipe.model.adapter
    assert b"Which kind" in out
