"""Kinds of GPU: the table, other common names, cards that are stated by hand, and GPUs without bf16."""

from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, tiny_recipe
from drumline.architectures.gpus import find_gpu
from drumline.errors import PlanError, RecipeError
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe import yaml12
from drumline.recipe.load import load_recipe, validate
from drumline.units import GIB

ROWS = yaml12.parse((ROOT / "toolkit/drumline/architectures/gpus.yaml").read_text())


def plan_on(gpu: Any, **sections: Any) -> Plan:
    return resolve(validate(tiny_recipe(cluster={"gpu": gpu}, **sections), "r"))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_whole(name: str) -> None:
    """Memory, a peak of some matrix units, workspace and a source; other names belong to one row only."""
    row, gpu = ROWS[name], find_gpu(name)
    assert row["source"]
    assert gpu.name == name
    assert gpu.is_cpu or (gpu.memory_bytes and gpu.narrow_flops and gpu.workspace_bytes)
    for other in row.get("also", []):
        assert other not in ROWS
        assert sum(other in r.get("also", []) for r in ROWS.values()) == 1


@pytest.mark.parametrize(
    ("stated", "taken"),
    [("h100", "h100-80gb"), ("H100", "h100-80gb"), ("H100-SXM", "h100-80gb"), ("a6000", "rtx-a6000"),
     ("A100-80GB", "a100-80gb"), ("RTX 4090", "rtx-4090")],
)  # fmt: skip
def test_a_common_name_is_taken_as_a_row_and_said(stated: str, taken: str) -> None:
    """The resolved recipe names the row, so that the same plan comes out again."""
    plan = plan_on(stated)
    assert plan.recipe.cluster.gpu == taken
    assert any(f"{stated} is taken as {taken}" in warning for warning in plan.warnings)
    again = resolve(plan.recipe)
    assert again.memory == plan.memory
    assert not any("is taken as" in warning for warning in again.warnings)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a100", "'a100-40gb' or 'a100-80gb'"),
        ("gh200", "'gh200-96gb' or 'gh200-144gb'"),
        ("v100", "'v100-16gb'"),
    ],
)
def test_a_name_that_stands_for_several_is_asked_back(name: str, meant: str) -> None:
    """Never the wrong one of two in silence; and the message says how to state a card by hand."""
    with pytest.raises(PlanError, match=f"Did you mean {meant}.*memory_gib: 48"):
        find_gpu(name)


def test_a_card_stated_by_hand_is_planned_like_a_row(tmp_path: Path) -> None:
    """From a file and as an override: its capacity and its name; the fix of the message works as it stands."""
    card = {"name": "my-card", "memory_gib": 48, "bf16_tflops": 155}
    plan = plan_on({**card, "memory_gib": 48.0, "bf16_tflops": 155.0})
    assert plan.memory.capacity == 48 * GIB
    recipe = load_recipe(
        "llama-1b-8xh100", ["cluster.gpu={name: my-card, memory_gib: 48, bf16_tflops: 155}"]
    )
    stated = resolve(recipe)
    assert (stated.memory.capacity, stated.recipe.cluster.gpu_name) == (48 * GIB, "my-card")
    assert (
        stated.memory.device
        == resolve(validate(stated.recipe.model_dump(by_alias=True), "r")).memory.device
    )
    with pytest.raises(RecipeError, match="memory_gib"):
        validate(tiny_recipe(cluster={"gpu": {"name": "my-card"}}), "r")


def test_bf16_on_a_card_without_it_is_told_and_fp16_offered() -> None:
    """V100 and T4 have matrix units for fp16 only; the CPU has a bf16 of its own."""
    for gpu in ("v100-32gb", "t4"):
        (warning,) = [w for w in plan_on(gpu, precision="bf16").warnings if "bf16" in w]
        assert "Nearest: precision=fp16" in warning
        assert not any("bf16" in w for w in plan_on(gpu, precision="fp16").warnings)
    assert not any("matrix units" in w for w in plan_on("cpu", precision="bf16").warnings)
