"""Images with augmentation: one curve at every split and with any workers, bitwise resume, real processes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from arena import STEPS, Arena
from fork_server import ForkServer

from data.made_images import write_classes
from drumline.plan.model import Plan

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [
    ("fsdp", SPLITS[2]),
    ("accelerate", SPLITS[1]),
    ("zero3", SPLITS[1]),
]
VIT = {"source": "config", "architecture": "vit", "config": {
    "image_size": 24, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}  # fmt: skip
IMAGE = {"size": 24, "jitter": 0.3, "erase": 0.3, "rand_augment": {}}


def plan_of(arena: Arena, engine: str, split: tuple[int, int, int], workers: int = 0) -> Plan:
    folder = arena.folder / "pictures"
    if not folder.exists():
        write_classes(folder / "train", 13)
        write_classes(folder / "val", 3)
    data = {"path": str(folder / "train"), "task": "classification", "image_field": "image", "image": IMAGE,
            "sequence_length": None, "workers": workers, "evaluation": {"source": "files", "path": str(folder / "val")}}  # fmt: skip
    evaluation = {"every_steps": 4, "per_device": 2}
    return arena.plan(engine, split, model=VIT, data=data, evaluation=evaluation)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("images"))
    for engine, split in RUNS:
        made.ask("train", f"{engine}-{split}", plan_of(made, engine, split))
    made.ask("train", "workers", plan_of(made, "ddp", SPLITS[1], workers=2))
    made.ask("verify", "verify", plan_of(made, "fsdp", SPLITS[1]), fault="")
    made.ask("train", "stopped", plan_of(made, "ddp", SPLITS[1], workers=1), stop_after=5)
    made.go()
    made.ask("train", "stopped", plan_of(made, "ddp", SPLITS[1]))
    made.go()
    return made


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_one_curve(arena: Arena, run: tuple[str, tuple[int, int, int]]) -> None:
    """Under every engine, to rounding, evaluations too."""
    engine, split = run
    found, wanted = (
        arena.curve(f"{engine}-{split}", "accuracy"),
        arena.curve(f"ddp-{SPLITS[0]}", "accuracy"),
    )
    assert len(found) == STEPS + 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=3e-5, abs=1e-5)


def test_workers_and_a_resume_change_nothing(arena: Arena) -> None:
    """Two workers or none, and a run that was stopped under one and goes on without: bitwise the same."""
    wanted = arena.curve(f"ddp-{SPLITS[1]}", "accuracy")
    assert arena.curve("workers", "accuracy") == wanted
    assert arena.curve("stopped", "accuracy") == wanted


def test_verification(arena: Arena) -> None:
    """The step's gradient is that of single images with their augmentation; the loss is the model's own."""
    assert arena.verdict("verify") == (True, True)
    assert arena.own_loss("verify")


def test_no_process_is_left(tmp_path: Path, forked: Any, fork_server: ForkServer) -> None:
    """A run with workers that ends by itself leaves no process behind, and one whose supervisor is killed neither."""
    write_classes(tmp_path / "train", 9)
    recipe = tmp_path / "pictures.yaml"
    recipe.write_text(json.dumps({
        "recipe": "pictures", "schema": 1, "model": VIT,
        "data": {"source": "files", "path": "train", "task": "classification", "image_field": "image",
                 "image": IMAGE, "validation": 0.2, "workers": 2},
        "batch": {"effective": 8, "per_device": 2, "gpus": 2, "accumulation": 2},
        "optimizer": {"name": "adamw", "lr": 3e-3}, "duration": {"steps": 4}, "evaluation": {"every_steps": 2}}))  # fmt: skip
    done = forked("run", str(recipe), "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert_nothing_is_left(tmp_path)
    child = fork_server.drumline(
        tmp_path, "run", str(recipe), "duration.steps=100000", "--run-dir", "killed"
    )
    end = time.monotonic() + 60
    while (
        not (tmp_path / "killed/metrics.jsonl").exists()
        or not (tmp_path / "killed/metrics.jsonl").stat().st_size
    ):
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    assert_nothing_is_left(tmp_path)


def assert_nothing_is_left(folder: Path) -> None:
    for _ in range(
        100
    ):  # the process that workers come from ends once it sees that its rank is gone
        left = [link for link in Path("/proc").glob("[0-9]*/cwd") if _is_below(link, folder)]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def _is_below(link: Path, folder: Path) -> bool:
    try:
        return link.readlink().is_relative_to(folder)
    except OSError:
        return False
