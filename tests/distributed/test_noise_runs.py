"""The noise scale out of the real loop: a problem whose answer is known, under every engine that can tell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_jobs

from conftest import tiny_recipe
from drumline.checkpoint.manifest import verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.train.batches import open_rows
from drumline.train.models import ModelBuilder

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

STEPS, FEW = 192, 32
"""DeepSpeed is slow on a CPU, and only has to measure what DDP does."""
DEEPSPEED: dict[str, Any] = {"launch": {"launcher": "deepspeed"}, "duration": {"steps": FEW}}
RUNS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "one": ((4, 1, 6), {}),
    "off": ((4, 2, 3), {"logging": {"every_steps": 50}}),
    "ddp": ((4, 2, 3), {}),
    "accelerate": ((4, 2, 3), {"launch": {"launcher": "accelerate"}, "duration": {"steps": FEW}}),
    "fsdp": ((4, 2, 3), {"strategy": {"name": "fsdp"}}),
    "fsdp-one": ((4, 1, 6), {"strategy": {"name": "fsdp"}}),
    "zero0": ((4, 2, 3), {**DEEPSPEED}),
    "zero1": ((4, 2, 3), {**DEEPSPEED, "strategy": {"name": "zero1"}}),
    "zero2": ((4, 2, 3), {**DEEPSPEED, "strategy": {"name": "zero2"}}),
    "zero3": ((4, 2, 3), {**DEEPSPEED, "strategy": {"name": "zero3"}}),
}


def plan_of(split: tuple[int, int, int], **sections: Any) -> Plan:
    """A rate so small that the weights stay where they are: each step measures the same problem."""
    b, gpus, k = split
    plain = {
        "batch": {
            "effective": b * gpus * k,
            "per_device": b,
            "gpus": gpus,
            "accumulation": k,
            "weighting": "sample",
        },
        "optimizer": {"name": "adamw", "lr": 1e-12},
        "duration": {"steps": STEPS},
        "logging": {"every_steps": 50, "noise_scale": True},
        **sections,
    }
    recipe = validate(tiny_recipe(**plain), "r")
    prepare_data(recipe)
    return make_plan(recipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, in one start for each number of ranks."""
    folder = tmp_path_factory.mktemp("noise")
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (split, sections) in RUNS.items():
        where = folder / name
        where.mkdir()
        plan = plan_of(split, **sections)
        (where / "plan.json").write_text(plan.to_json())
        jobs[split[1]].append(
            {"kind": "train", "plan": str(where / "plan.json"), "folder": str(where)}
        )
    for world, theirs in jobs.items():
        run_jobs(world, theirs, folder / f"ranks-{world}")
    return folder


@pytest.fixture(scope="module")
def truth() -> tuple[float, float]:
    """tr Σ and |G|² of the whole data set at the initial weights, one sample at a time in fp64."""
    plan = plan_of((4, 1, 6))
    assert plan.data.cache
    manifest = read_dataset_manifest(Path(plan.data.cache))
    assert manifest
    model = ModelBuilder(plan.recipe, manifest, dtype=torch.float64).whole()
    rows = open_rows(plan, "train")
    arrays = rows.collate(np.arange(len(rows)))
    features = torch.from_numpy(np.array(arrays["features"])).double()
    targets = torch.from_numpy(np.array(arrays["targets"]))
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(model, weights, (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(out, y.reshape(1))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, features, targets
    )
    gradients = torch.cat([g.flatten(1) for g in each.values()], dim=1).detach()
    mean = gradients.mean(dim=0)
    return float((gradients - mean).square().sum(dim=1).mean()), float(mean.square().sum())


def pairs_of(folder: Path) -> Any:
    return np.array(verify(find_checkpoints(folder / "checkpoints")[-1]).noise)


def assert_close(ours: Any, theirs: Any) -> None:
    """As many steps as `ours` has, to 1e-4 of the largest."""
    size = np.abs(theirs).max(axis=0)
    np.testing.assert_allclose(ours / size, theirs[: len(ours)] / size, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["one", "ddp", "fsdp", "fsdp-one"])
def test_the_answer_is_found(runs: Path, truth: tuple[float, float], name: str) -> None:
    """Noise and signal within their sampling error; the logged interval holds the true ratio."""
    pairs = pairs_of(runs / name)
    assert len(pairs) == STEPS
    for found, true in zip(pairs.T, truth, strict=True):
        assert abs(found.mean() - true) < 4 * found.std() / STEPS**0.5, (name, found.mean(), true)
    last = [line for line in read_metrics(runs / name / "metrics.jsonl") if "lr" in line][-1]
    assert last["noise_scale_low"] < truth[0] / truth[1] < last["noise_scale_high"]
    assert last["noise_scale_high"] < 3 * last["noise_scale"]


@pytest.mark.parametrize("name", ["accelerate", "zero0", "zero1", "zero2", "zero3"])
def test_engines_measure_the_same(runs: Path, name: str) -> None:
    """What hooks see does not depend on who exchanges the gradients."""
    assert_close(pairs_of(runs / name), pairs_of(runs / "ddp"))


def test_one_process_and_two_measure_the_same(runs: Path) -> None:
    """The six groups of four are the same samples, whoever has them."""
    assert_close(pairs_of(runs / "one"), pairs_of(runs / "ddp"))


def test_measuring_changes_no_bit(runs: Path) -> None:
    """Losses, norms and final weights with and without it."""
    lines = [
        [line for line in read_metrics(runs / n / "metrics.jsonl") if "lr" in line]
        for n in ("off", "ddp")
    ]
    keys = ("step", "loss", "grad_norm", "digest")
    assert [[line[k] for k in keys] for line in lines[0]] == [
        [line[k] for k in keys] for line in lines[1]
    ]
    assert "noise_scale" not in lines[0][-1]
    final = f"checkpoints/step-{STEPS:08d}/rank-0.json"
    tensors = [json.loads((runs / n / final).read_text())["tensors"] for n in ("off", "ddp")]
    assert tensors[0] == tensors[1]
