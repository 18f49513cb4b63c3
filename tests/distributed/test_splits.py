"""The one promise on real processes: how the batch is split never changes the training.

Rows of very unequal token counts (prompt and completion), a last step of 5 samples of 12, so that
at 4 ranks some have none; one, two and four processes; DDP, FSDP2 and HSDP.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_jobs
from safetensors.torch import load_file
from unequal import unequal_plan, write_pairs
from whole_tensors import whole_tensors

from drumline.checkpoint.boxes import Box
from drumline.checkpoint.shards import read_entries
from drumline.metrics_file import read_metrics
from drumline.plan.model import Plan

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

SPLITS = [(12, 1, 1), (1, 1, 12), (6, 2, 1), (2, 2, 3), (3, 4, 1), (1, 4, 3)]
STRATEGIES = {"ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"}}
REFERENCE = "ddp-12x1x1"
VARIANTS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "hsdp": (
        (1, 4, 3),
        {"strategy": {"name": "fsdp", "shard": "node"}, "cluster": {"gpus_per_node": 2}},
    ),
    "chunked": ((2, 2, 3), {"loss": {"chunked": True}}),
    "chunked-fsdp": ((2, 2, 3), {"loss": {"chunked": True}, "strategy": {"name": "fsdp"}}),
    "checkpointing": ((2, 2, 3), {"model": {"activation_checkpointing": "full"}}),
    "selective": ((2, 2, 3), {"model": {"activation_checkpointing": "selective"}}),
    "selective-fsdp": (
        (2, 2, 3),
        {
            "model": {"activation_checkpointing": "selective", "activation_offload": True},
            "strategy": {"name": "fsdp"},
        },
    ),
    "kept-backward": ((2, 2, 3), {"strategy": {"name": "fsdp", "reshard": "backward"}}),
    "kept-step": ((1, 4, 3), {"strategy": {"name": "fsdp", "reshard": "step"}}),
    "once": ((2, 2, 3), {"strategy": {"name": "fsdp", "reshard": "step", "reduce": "step"}}),
    "hsdp-once": (
        (1, 4, 3),
        {
            "strategy": {"name": "fsdp", "shard": "node", "reduce": "step"},
            "cluster": {"gpus_per_node": 2},
        },
    ),
    "foreach": ((6, 2, 1), {"optimizer": {"implementation": "foreach"}}),
}
"""Other ways to compute the same training; each must agree with the reference."""
PRECISIONS = ["bf16", "bf16-pure", "fp16"]
BATCHNORM = {
    "model": {"source": "factory", "architecture": None, "factory": "example_models:cnn",
              "config": {"features": 32, "channels": 4, "classes": 10}},
    "data": {"source": "builtin", "name": "synthetic-classification", "path": None,
             "task": "classification", "validation": 0.2},
    "evaluation": {"every_steps": 2, "per_device": 64},
    "checkpoint": {"every_steps": 1, "keep_last": 99},
    "duration": {"steps": 10},
}  # fmt: skip
"""Also saves at every step, which a race between a vote and a rename would not survive."""
EXPERTS = {
    "model": {"source": "config", "architecture": "mixtral",
              "config": {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
                         "num_experts_per_tok": 2}},
}  # fmt: skip
"""Fewer experts than ranks, so that their weights are folded before FSDP2 shards them. Each token takes both: a
router that chooses can choose another expert after rounding."""
RESUMES = {
    1: [("ddp", (4, 1, 3))],
    2: [("ddp", (2, 2, 3)), ("fsdp", (3, 2, 2))],
    4: [("fsdp", (3, 4, 1))],
}


class Matrix:
    """All runs of this file, by name; each world size is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
        self.starts = 0
        self.data = write_pairs(folder)

    def plan(self, split: tuple[int, int, int], **changes: Any) -> Plan:
        return unequal_plan(self.data, split, **changes)

    def write_plan(self, name: str, plan: Plan) -> Path:
        path = self.folder / f"{name}.plan.json"
        path.write_text(plan.to_json())
        return path

    def train(self, name: str, plan: Plan, **options: Any) -> None:
        path = self.write_plan(name, plan)
        job = {"kind": "train", "plan": str(path), "folder": str(self.folder / name), **options}
        self.jobs[plan.batch.gpus].append(job)

    def gradient(self, name: str, plan: Plan, step: int) -> None:
        path = self.write_plan(name, plan)
        out = str(self.folder / f"{name}.pt")
        self.jobs[plan.batch.gpus].append(
            {"kind": "gradient", "plan": str(path), "out": out, "step": step}
        )

    def start(self, world: int) -> None:
        self.starts += 1
        run_jobs(world, self.jobs[world], self.folder / f"start-{self.starts}")

    def steps(self, name: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if "lr" in line]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return whole_tensors(self.folder / name / "checkpoints" / "step-00000020", "model.")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    m = Matrix(tmp_path_factory.mktemp("matrix"))
    for split in SPLITS:
        for strategy, section in STRATEGIES.items():
            name = f"{strategy}-{'x'.join(map(str, split))}"
            m.train(name, m.plan(split, strategy=section))
            m.gradient(f"grad-{name}", m.plan(split, strategy=section), step=4)
    for name, (split, changes) in VARIANTS.items():
        m.train(name, m.plan(split, **changes))
    for precision in PRECISIONS:
        for strategy, section in STRATEGIES.items():
            plan = m.plan((2, 2, 3), precision=precision, strategy=section, duration={"steps": 6})
            m.train(f"{precision}-{strategy}", plan)
    m.train("first-half", m.plan((6, 2, 1)), stop_after=10)
    for strategy, section in STRATEGIES.items():
        plan = m.plan((2, 2, 3), strategy=section, **BATCHNORM)
        m.train(f"norm-{strategy}", plan)
        m.train(f"norm-{strategy}-resumed", plan, stop_after=5)
    sgd = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "implementation": None}
    for strategy, section in STRATEGIES.items():
        m.train(f"sgd-{strategy}", m.plan((2, 2, 3), strategy=section, optimizer=sgd))
    m.train("experts-ddp-1", m.plan((12, 1, 1), **EXPERTS))
    m.train("experts-fsdp-4", m.plan((1, 4, 3), strategy={"name": "fsdp"}, **EXPERTS))
    hsdp = {"strategy": {"name": "fsdp", "shard": "node"}, "cluster": {"gpus_per_node": 4}}
    half = m.plan((1, 4, 3), **hsdp, **EXPERTS)
    m.train("experts-resumed", half, stop_after=10)
    m.start(2)
    m.jobs[2] = []
    for strategy, section in STRATEGIES.items():
        m.train(f"norm-{strategy}-resumed", m.plan((2, 2, 3), strategy=section, **BATCHNORM))
    for world, resumes in RESUMES.items():
        for strategy, split in resumes:
            name = f"resumed-{strategy}-{world}"
            shutil.copytree(m.folder / "first-half", m.folder / name)
            m.train(name, m.plan(split, strategy=STRATEGIES[strategy]))
    m.start(4)
    m.train("experts-resumed", m.plan((6, 2, 1), **EXPERTS))
    for world in (1, 2):
        m.start(world)
    return m


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def weight_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all weights over the norm of all weights."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return (difference / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5


NAMES = [f"{s}-{'x'.join(map(str, split))}" for split in SPLITS for s in STRATEGIES]


@pytest.mark.parametrize("name", [n for n in NAMES if n != REFERENCE] + list(VARIANTS))
def test_every_split_and_strategy_trains_the_same(matrix: Matrix, name: str) -> None:
    """20 fp32 steps: losses within 1e-6, all weights norm-wise within 1e-5; digests and rates equal."""
    ours, reference = matrix.steps(name), matrix.steps(REFERENCE)
    assert len(ours) == len(reference) == 20
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine["loss"], theirs["loss"]) < 1e-6, mine["step"]
        assert relative(mine["grad_norm"], theirs["grad_norm"]) < 1e-4
        for key in ("digest", "lr", "weight", "samples", "epoch"):
            assert mine[key] == theirs[key]
    assert weight_distance(matrix.weights(name), matrix.weights(REFERENCE)) < 1e-5


@pytest.mark.parametrize("name", ["experts-fsdp-4", "experts-resumed"])
def test_folded_experts_train_the_same(matrix: Matrix, name: str) -> None:
    """2 experts on 4 ranks, and resumed from there unsharded on 2: losses and weights of one rank."""
    ours, reference = matrix.steps(name), matrix.steps("experts-ddp-1")
    assert [line["step"] for line in ours] == list(range(1, 21))
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine["loss"], theirs["loss"]) < 1e-6, mine["step"]
    assert weight_distance(matrix.weights(name), matrix.weights("experts-ddp-1")) < 1e-5


def test_experts_are_divided_over_more_ranks_than_experts(matrix: Matrix) -> None:
    """Two experts on four ranks: each saves half of one, and no rank holds padding."""
    folder = matrix.folder / "experts-fsdp-4/checkpoints/step-00000020"
    for rank in range(4):
        entry = read_entries(folder, rank)["model.model.layers.0.mlp.experts.gate_up_proj"]
        assert entry["boxes"] == (Box((rank // 2, 24 * (rank % 2), 0), (1, 24, 32)),)


def test_the_runs_had_what_makes_them_hard(matrix: Matrix) -> None:
    """Unequal weights, a short last step, a rank without a sample, and training that moved."""
    steps = matrix.steps(REFERENCE)
    sizes = [
        b["samples"] - a["samples"] for a, b in zip([{"samples": 0}, *steps], steps, strict=False)
    ]
    assert sorted(set(sizes)) == [5, 12]
    assert len({line["weight"] for line in steps}) > 5
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


@pytest.mark.parametrize("name", [n for n in NAMES if n != REFERENCE])
def test_the_gradient_is_that_of_the_undivided_batch(matrix: Matrix, name: str) -> None:
    """fp64, the short step of 5 samples, ranks without any: relative error below 1e-10."""
    whole = torch.load(matrix.folder / f"grad-{REFERENCE}.pt", weights_only=True)
    ours = torch.load(matrix.folder / f"grad-{name}.pt", weights_only=True)
    assert all(g.dtype == torch.float64 for g in whole.values())
    assert weight_distance(ours, whole) < 1e-10


@pytest.mark.parametrize(("world", "strategy"), [(w, s) for w, r in RESUMES.items() for s, _ in r])
def test_a_resume_at_another_split_or_strategy_goes_on(
    matrix: Matrix, world: int, strategy: str
) -> None:
    """10 steps at 2 ranks DDP, then 10 at 1, 2 or 4, DDP or FSDP: the losses of the straight run."""
    ours, reference = matrix.steps(f"resumed-{strategy}-{world}"), matrix.steps(REFERENCE)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine["loss"], theirs["loss"]) < 1e-6
        assert mine["digest"] == theirs["digest"]
    assert (
        weight_distance(matrix.weights(f"resumed-{strategy}-{world}"), matrix.weights(REFERENCE))
        < 1e-5
    )


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(matrix: Matrix) -> None:
    """The last rank alone was asked to stop: all saved at the same step."""
    outcome = json.loads((matrix.folder / "first-half" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("stopped", 10)
    assert (
        matrix.folder / "first-half" / "checkpoints" / "step-00000010" / "manifest.json"
    ).is_file()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_lower_precisions_follow_the_same_curve(
    matrix: Matrix, precision: str, strategy: str
) -> None:
    """bf16, bf16-pure and fp16 stay within 3 % of fp32 over six steps, on the same samples."""
    reference = matrix.steps(REFERENCE)
    ours = matrix.steps(f"{precision}-{strategy}")
    assert len(ours) == 6
    for mine, theirs in zip(ours, reference, strict=False):
        assert mine["digest"] == theirs["digest"]
        assert not mine["skipped"]
        assert relative(mine["loss"], theirs["loss"]) < 0.03
    assert ours[0]["loss"] != reference[0]["loss"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_batchnorm_resumes_bitwise_at_the_same_split(matrix: Matrix, strategy: str) -> None:
    """5 + 5 steps on two ranks equal 10: losses, evaluations and the saved statistics."""
    runs = [matrix.folder / name for name in (f"norm-{strategy}", f"norm-{strategy}-resumed")]
    lines = [read_metrics(run / "metrics.jsonl") for run in runs]
    keys = ("step", "loss", "digest", "eval/loss", "eval/accuracy")
    told = [
        [{k: line.get(k) for k in keys} for line in run if "lr" in line or "eval/loss" in line]
        for run in lines
    ]
    assert told[0] == told[1]
    assert sum("eval/loss" in line for line in lines[0]) == 5
    states = [load_file(run / "checkpoints/step-00000010/rank-0.safetensors") for run in runs]
    assert any("running_var" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sgd_trains_the_same_sharded(matrix: Matrix) -> None:
    """Momentum SGD under DDP and FSDP2: losses within 1e-6."""
    for mine, theirs in zip(matrix.steps("sgd-fsdp"), matrix.steps("sgd-ddp"), strict=True):
        assert relative(mine["loss"], theirs["loss"]) < 1e-6
