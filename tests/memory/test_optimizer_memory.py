"""Every optimizer's states and the temporaries of its step: the closed form says what the trace says."""

import statistics

import pytest

from drumline.recipe.load import merge
from memory.family_grid import Cell, _trace, diagonal
from memory.plans import small_plan


@pytest.mark.parametrize("name", ["adamw_8bit", "lion", "muon"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_closed_form_is_the_trace(architecture: str, name: str) -> None:
    """Three combinations: median ≤ 1 %, none above 4 %."""
    errors = []
    rule = {"optimizer": {"name": name, "lr": 1e-3, "weight_decay": 0.1}}
    for one in diagonal():
        sections = merge(one, rule)
        plan = small_plan(architecture, **sections)
        errors.append(abs(Cell(architecture, sections, plan, _trace(plan, architecture)).error))
    assert statistics.median(errors) <= 0.01
    assert max(errors) <= 0.04


def test_states_are_as_large_as_they_are() -> None:
    """Bytes of a step's states per parameter of a large model: 8, 2, 4, about 4, and nearly none."""
    found = {}
    for name in ("adamw", "adamw_8bit", "lion", "muon", "adafactor"):
        plan = small_plan("llama", optimizer={"name": name, "lr": 1e-3})
        assert plan.cost.checkpoint_bytes
        assert plan.cost.parameters
        found[name] = plan.cost.checkpoint_bytes / plan.cost.parameters - 4
    assert found["adamw"] == pytest.approx(8)
    assert found["adamw_8bit"] == pytest.approx(2.03, abs=0.01)
    assert found["lion"] == pytest.approx(4)
    assert 4 < found["muon"] < 6
    assert found["adafactor"] < 0.1
