"""The one promise on a real GPU: splits agree, a resumed run goes on bit by bit. Skipped where there is none."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import run_drumline
from drumline.data.prepare import prepare
from drumline.metrics_file import read_metrics
from drumline.recipe.load import validate
from drumline.session.planning import make_plan

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

ROWS = 8
STEPS = 8
SPLITS = [(8, 1), (4, 2), (1, 8)]
WITHIN = {"fp32": 1e-5, "bf16": 2e-3, "bf16-pure": 1e-2}
"""Relative difference of any step's loss between splits: the dtype's rounding, over eight steps."""


def recipe_of(split: tuple[int, int], precision: str, **model: Any) -> dict[str, Any]:
    """Rows of unequal token counts through a small Llama with grouped heads."""
    return {
        "recipe": "on-a-gpu",
        "schema": 1,
        "seed": 5,
        "model": {"source": "config", "architecture": "llama",
                  "config": {"vocab_size": 257, "hidden_size": 256, "intermediate_size": 512,
                             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
                  **model},
        "data": {"source": "files", "path": "pairs.jsonl", "task": "sft", "sequence_length": 128},
        "batch": {"effective": ROWS, "per_device": split[0], "gpus": 1, "accumulation": split[1]},
        "cluster": {"gpu": "h100-80gb"},
        "precision": precision,
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "duration": {"steps": STEPS},
        "checkpoint": {"every_steps": 4, "keep_last": 9},
        "logging": {"every_steps": 1},
    }  # fmt: skip


def write_pairs(folder: Path) -> None:
    """Completions of one to a hundred letters."""
    pairs = [
        {"prompt": f"{n} letters: ", "completion": "abcdefghij"[n % 10] * (1 + 7 * n % 100)}
        for n in range(200)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def train_on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Trains a recipe in this process, in a process group of one; returns the lines of its metrics."""
    import torch.distributed as dist

    from drumline.train.loop import train

    project = tmp_path_factory.mktemp("gpu")
    write_pairs(project)
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)

    def run(plain: dict[str, Any], name: str, until: int | None = None) -> list[dict[str, Any]]:
        data = {**plain["data"], "path": str(project / plain["data"]["path"])}
        recipe = validate({**plain, "data": data}, "r")
        prepare(recipe.data, recipe.project)
        folder = project / name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        train(make_plan(recipe), folder, torch.device("cuda", 0), until=until)
        return [line for line in read_metrics(folder / "metrics.jsonl") if "lr" in line]

    yield run
    dist.destroy_process_group()


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """The loss of every step."""
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("precision", list(WITHIN))
def test_splits_train_the_same(train_on_the_gpu: Callable[..., Any], precision: str) -> None:
    """8 x 1, 4 x 2 and 1 x 8 on unequal rows; the loss, in chunks and with checkpointing too."""
    runs = {
        f"{b}x{k}": losses(train_on_the_gpu(recipe_of((b, k), precision), f"{precision}-{b}x{k}"))
        for b, k in SPLITS
    }
    frugal = recipe_of((2, 4), precision, activation_checkpointing="full")
    frugal["loss"] = {"chunked": True}
    runs["frugal"] = losses(train_on_the_gpu(frugal, f"{precision}-frugal"))
    reference = runs["8x1"]
    assert reference[-1] < reference[0]
    for name, found in runs.items():
        furthest = max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))
        print(f"{precision} {name}: largest relative difference {furthest:.2e}")
        assert furthest <= WITHIN[precision], name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_goes_on_bitwise(
    train_on_the_gpu: Callable[..., Any], precision: str
) -> None:
    """Stopped at step 4 and resumed, against never stopped: every loss and gradient norm is equal."""
    recipe = recipe_of((4, 2), precision)
    straight = train_on_the_gpu(recipe, f"{precision}-straight")
    train_on_the_gpu(recipe, f"{precision}-resumed", until=4)
    resumed = train_on_the_gpu(recipe, f"{precision}-resumed")
    assert losses(resumed) == losses(straight)
    assert [line["grad_norm"] for line in resumed] == [line["grad_norm"] for line in straight]


def test_the_command_runs_and_verifies(tmp_path: Path) -> None:
    """`drumline run` through torchrun: MFU and memory are in its record; `drumline verify` is green."""
    write_pairs(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of((4, 2), "bf16")))
    done = run_drumline(tmp_path, "run", "r.yaml", "--run-dir", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in read_metrics(tmp_path / "first/metrics.jsonl") if "lr" in line]
    assert all(0 < line["mfu"] < 1 for line in lines)
    (attempt,) = json.loads((tmp_path / "first/record.json").read_text())["attempts"]
    memory = attempt["memory"]
    print("predicted", memory["predicted"], "measured", memory["measured"])
    assert memory["measured"]["allocated"] > 0
    done = run_drumline(tmp_path, "verify", "r.yaml")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
