"""The stored reference of a preference run: computed once, kept, gone on with, and that of the right weights."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_preferences import rows_in
from unequal import unequal_plan

from advice import heard
from drumline.data.cache import cache_root
from drumline.errors import CheckpointError, DataError
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.rank_files import Heartbeat
from drumline.train import reference
from drumline.train.loop import Outcome, train
from drumline.train.reference import reference_key
from drumline.train.watch import Watch


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "cache"))


@dataclass
class Counted:
    """A watch that counts forwards for the reference, and asks to stop after `most` of them."""

    most: float = math.inf
    forwards: list[str] = field(default_factory=list)

    @property
    def watch(self) -> Watch:
        def heard(beat: Heartbeat) -> None:
            if beat.phase is Phase.MEASURING:
                self.forwards.append(beat.detail)

        return Watch(heartbeat=heard, stop_asked=lambda: len(self.forwards) > self.most)


def plan_of(folder: Path, **changes: Any) -> Plan:
    data = {"path": str(rows_in(folder, True)), "task": "preference", "sequence_length": 40, "validation": 0.15}  # fmt: skip
    base = {"data": data, "objective": {"name": "dpo"}, "evaluation": {"every_steps": 2, "per_device": 4},
            "schedule": {"warmup_steps": 0}, "duration": {"steps": 3}, "checkpoint": {"every_steps": 1, "keep_last": 9}}  # fmt: skip
    return unequal_plan(folder, (4, 1, 3), **{**base, **changes})


def run(plan: Plan, folder: Path, counted: Counted | None = None) -> Outcome:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    watch = (counted or Counted()).watch
    return train(plan, folder, torch.device("cpu"), watch=watch)


def stored() -> dict[str, np.ndarray[Any, Any]]:
    (folder,) = (cache_root() / "reference").iterdir()
    return {path.stem: np.load(path) for path in folder.iterdir()}


def first_margin(folder: Path) -> float:
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return float(line["reward_margin"])


def test_it_is_computed_once(tmp_path: Path) -> None:
    """Nine micro-batches of 34 rows and two of 7; another rate, adapter or objective reads what is there."""
    first, second, third = Counted(), Counted(), Counted()
    run(plan_of(tmp_path), tmp_path / "first", first)
    assert len(first.forwards) == 9 + 2
    run(plan_of(tmp_path, optimizer={"lr": 1e-5}), tmp_path / "second", second)
    adapted = plan_of(tmp_path, model={"adapter": {"rank": 2}}, objective={"name": "dpo", "loss_type": "hinge"})  # fmt: skip
    run(adapted, tmp_path / "third", third)
    assert second.forwards == third.forwards == []
    assert {part: values.shape for part, values in stored().items()} == {
        "train": (34, 2),
        "validation": (7, 2),
    }
    assert abs(first_margin(tmp_path / "third")) < 1e-5
    other = Counted()
    run(plan_of(tmp_path, seed=99), tmp_path / "other", other)
    assert len(other.forwards) == 11


def test_means_are_kept_apart(tmp_path: Path) -> None:
    """IPO's reference is a mean over tokens, so that of DPO is not taken for it."""
    run(plan_of(tmp_path), tmp_path / "first")
    counted = Counted()
    run(plan_of(tmp_path, objective={"name": "ipo"}), tmp_path / "second", counted)
    assert len(counted.forwards) == 11


def test_a_stopped_computation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before the stop is not computed again, and the values are the same."""
    run(plan_of(tmp_path), tmp_path / "whole")
    (folder,) = (cache_root() / "reference").iterdir()
    whole = stored()
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setattr(reference, "FORWARDS_PER_SAVE", 2)
    stopped, again = Counted(most=4), Counted()
    outcome = run(plan_of(tmp_path), tmp_path / "run", stopped)
    assert (outcome.outcome, outcome.step) == ("stopped", 0)
    left = int(np.isnan(stored()["train"]).any(axis=1).sum())
    assert 0 < left < 34
    assert run(plan_of(tmp_path), tmp_path / "run", again).outcome == "finished"
    assert len(again.forwards) == math.ceil(left / 4) + 2
    for part, values in stored().items():
        assert np.allclose(values, whole[part], rtol=1e-6)


def test_the_reference_is_what_the_run_begins_from(tmp_path: Path) -> None:
    """Of another run's weights, at first the margin is zero; once the run is under way, it is not computed anew."""
    parent = plan_of(tmp_path)
    run(parent, tmp_path / "parent")
    start = {"run": str(tmp_path / "parent/checkpoints/step-00000003"), "what": "weights"}
    child, counted = plan_of(tmp_path, start_from=start), Counted()
    run(child, tmp_path / "child", counted)
    assert len(counted.forwards) == 11
    assert abs(first_margin(tmp_path / "child")) < 1e-5
    (tmp_path / "child/checkpoints/step-00000003").rename(tmp_path / "aside")
    again = Counted()
    assert run(child, tmp_path / "child", again).outcome == "finished"
    assert again.forwards == []
    for path in (cache_root() / "reference").glob("*/*.npy"):
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        run(child, tmp_path / "child")
    heard("of the reference are gone, and the model has been trained since", str(caught.value))
    assert run(child, tmp_path / "anew").outcome == "finished"
    assert run(child, tmp_path / "child").outcome == "finished"


def test_weights_that_are_drawn_anew_have_another_reference(tmp_path: Path) -> None:
    """Edits of a pretrained model draw by the seed, so two seeds share no reference."""
    plan = plan_of(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    pretrained = {"source": "folder", "path": str(tmp_path), "architecture": None, "config": {}}
    recipe = plan.recipe

    def key(edits: list[str], seed: int) -> str:
        model = recipe.model.model_copy(update={**pretrained, "edits": edits})
        changed = recipe.model_copy(update={"model": model, "seed": seed, "project": str(tmp_path)})
        return reference_key(dataclasses.replace(plan, recipe=changed), "rows", False)

    (tmp_path / "ed.py").write_text("def edit(model):\n    pass\n")
    assert key([], 1) == key([], 2)
    assert key(["ed:edit"], 1) != key(["ed:edit"], 2)


def test_a_model_that_computes_nothing_is_refused(tmp_path: Path) -> None:
    """Before the first step, with the row."""
    broken = {"model": {"config": {"initializer_range": 1e30}}}
    with pytest.raises(DataError) as caught:
        run(plan_of(tmp_path, **broken), tmp_path / "run")
    heard("of the prepared data is not finite before training", str(caught.value))
    assert run(plan_of(tmp_path), tmp_path / "sound").outcome == "finished"


def test_damaged_files_are_computed_anew(tmp_path: Path) -> None:
    """Cut off, empty, a pickle, or gone while the run is under way: of the weights before training."""
    run(plan_of(tmp_path), tmp_path / "run")
    whole = stored()
    for path in (cache_root() / "reference").glob("*/*.npy"):
        path.unlink()
    (tmp_path / "run/checkpoints/step-00000003").rename(tmp_path / "aside")
    assert run(plan_of(tmp_path), tmp_path / "run").outcome == "finished"
    for part, values in stored().items():
        assert np.array_equal(values, whole[part])
    for name, raw in {"cut": b"\x93NUMPY\x01", "none": b""}.items():
        for path in (cache_root() / "reference").glob("*/*.npy"):
            path.write_bytes(raw)
        run(plan_of(tmp_path), tmp_path / name)
    for path in (cache_root() / "reference").glob("*/*.npy"):
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    run(plan_of(tmp_path), tmp_path / "pickle")
    for part, values in stored().items():
        assert np.array_equal(values, whole[part])
