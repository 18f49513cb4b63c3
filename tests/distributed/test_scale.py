"""Hazards of scale, held by counts: files opened, manifests parsed, draws, collectives, synchronisations."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_jobs

from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.session.planning import make_plan

pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("matrix")]

LLAMA = {
    "source": "config", "factory": None, "architecture": "llama",
    "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "vocab_size": 257,
               "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
}  # fmt: skip
TEXT = {
    "source": "builtin", "name": "python-stdlib", "options": {"max_files": 4}, "task": "causal_lm",
    "sequence_length": 32, "samples": None, "validation": 0.0,
}  # fmt: skip


def plan_of(gpus: int, **sections: Any) -> Plan:
    plain = tiny_recipe(
        model=LLAMA, data=TEXT, batch={"effective": 8, "per_device": 1, "gpus": gpus, "weighting": "token"},
        duration={"steps": 4}, checkpoint={"every_steps": 2}, **sections,
    )  # fmt: skip
    recipe = validate(plain, "r")
    prepare(recipe.data, recipe.project)
    return make_plan(recipe)


def written(plan: Plan, path: Path) -> str:
    path.write_text(plan.to_json())
    return str(path)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks did when they loaded, built and trained, by job."""
    folder = tmp_path_factory.mktemp("scale")
    plans = {
        "ddp": written(plan_of(2), folder / "ddp.json"),
        "fsdp": written(plan_of(2, strategy={"name": "fsdp"}), folder / "fsdp.json"),
    }
    policies = {
        "backward": {"name": "fsdp", "reshard": "backward"},
        "step": {"name": "fsdp", "reshard": "step"},
        "once": {"name": "fsdp", "reshard": "step", "reduce": "step"},
    }
    for name in plans:
        (folder / name).mkdir()
    jobs: list[dict[str, Any]] = []
    for name, plan in plans.items():
        jobs.append({"kind": "train", "plan": plan, "folder": str(folder / name)})
    for name, plan in plans.items():
        source = str(folder / "fsdp/checkpoints/step-00000004")
        out = str(folder / f"load-{name}")
        jobs.append({"kind": "count_load", "plan": plan, "source": source, "out": out})
        jobs.append({"kind": "count_build", "plan": plan, "out": str(folder / f"build-{name}")})
        jobs.append({"kind": "count_step", "plan": plan, "out": str(folder / f"step-{name}")})
    for name, strategy in policies.items():
        plan = written(plan_of(2, strategy=strategy), folder / f"{name}.json")
        jobs.append({"kind": "count_step", "plan": plan, "out": str(folder / f"step-{name}")})
    run_jobs(2, jobs, folder / "ranks")
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-[01].json"))}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_each_manifest_is_parsed_once_and_replicated_state_read_once(
    counted: dict[str, Any], engine: str
) -> None:
    """Of the two ranks' manifests each rank parses one; under DDP each tensor is read by one rank."""
    both = [counted[f"load-{engine}-{rank}"] for rank in (0, 1)]
    assert [found["manifests"] for found in both] == [[0], [1]]
    if engine == "ddp":
        read = [set(found["tensors"]) for found in both]
        assert not read[0] & read[1]
        assert len(read[0] | read[1]) == both[0]["held"]
        assert all(read)
        in_shards = {name for name in read[0] | read[1] if not name.endswith(".step")}
        assert in_shards <= set(both[0]["asked"] + both[1]["asked"])
    else:  # saved at the same split: each rank opens its own shard, and the other's for scalars only
        assert all(found["opened"] for found in both)
        assert all(found["tensors"] for found in both)
        for found in both:  # and asks rank 0 for those alone, which any rank may have written
            assert all(name.endswith(".step") for name in (*found["asked"], *found["told"]))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_each_block_is_drawn_by_one_rank_and_counts_as_progress(
    counted: dict[str, Any], engine: str
) -> None:
    """Five blocks and the rest are drawn once over both ranks; each is a heartbeat; all weights are alike."""
    both = [counted[f"build-{engine}-{rank}"] for rank in (0, 1)]
    assert [found["drawn"] for found in both] == [
        ["model.layers.0", "model.layers.2", "model.layers.4", "rest"],
        ["model.layers.1", "model.layers.3"],
    ]
    for found in both:
        assert found["progress"] == [f"block {number} of 5" for number in range(1, 6)]
        assert found["weights"] == both[0]["weights"] == found["alone"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_step_waits_for_the_device_once(counted: dict[str, Any], engine: str) -> None:
    """One read of numbers a step, no tensor made out of Python numbers, also with the noise meter on."""
    for rank in (0, 1):
        found = counted[f"step-{engine}-{rank}"]
        assert found["reads"] == found["steps"]
        assert found["copies"] == 0
        assert found["collections"] == 0


COLLECTIVES = {
    "ddp": {"allreduce": 2},
    "fsdp": {"allgather_base": 4 * 11, "reduce_scatter_base": 4 * 6, "allreduce": 1},
    "backward": {"allgather_base": 4 * 6, "reduce_scatter_base": 4 * 6, "allreduce": 1},
    "step": {"allgather_base": 6, "reduce_scatter_base": 4 * 6, "allreduce": 1},
    "once": {"allgather_base": 6, "reduce_scatter_base": 6, "allreduce": 1},
}
"""Of a step of four micro-batches: DDP's one bucket; five blocks and the root, which is gathered once in a
micro-batch; and one all-reduce for loss and flags. FSDP2's norm is reduced, too."""
NORM = {"all_reduce": 1}


@pytest.mark.parametrize("engine", COLLECTIVES)
def test_collectives_of_a_step(counted: dict[str, Any], engine: str) -> None:
    """No more than these, and with `reshard` and `reduce` as much fewer as they say."""
    expected = COLLECTIVES[engine] | ({} if engine == "ddp" else NORM)
    for rank in (0, 1):
        found = counted[f"step-{engine}-{rank}"]
        a_step = {name: count / found["steps"] for name, count in found["collectives"].items()}
        assert a_step == expected
