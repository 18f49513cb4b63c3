"""What smoothed targets and a z-loss cost in memory: the closed form is the trace, and more than without."""

from typing import Any

import pytest

from drumline.recipe.load import merge
from memory.family_grid import Cell, _trace, diagonal
from memory.plans import small_plan

LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "chunked z-loss": {"z_loss": 1e-4, "chunked": True},
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_closed_form_is_the_trace(name: str) -> None:
    """Three combinations, within 0.5 %."""
    for one in diagonal():
        sections = merge(one, {"loss": LOSSES[name]})
        plan = small_plan("llama", **sections)
        assert abs(Cell("llama", sections, plan, _trace(plan, "llama")).error) <= 0.005


def test_a_z_loss_keeps_one_more_gradient_of_the_logits() -> None:
    """4 bytes for each of the logits, in the closed form as in the trace, which is what real tensors allocate."""
    sections = {"precision": "fp32", "b": 5, "length": 96}
    plain, added = (small_plan("llama", **sections, loss=loss) for loss in ({}, {"z_loss": 1e-4}))
    logits = 4 * 5 * 96 * 2048
    closed = max(added.memory.phases.values()) - max(plain.memory.phases.values())
    traced = _trace(added, "llama").peak - _trace(plain, "llama").peak
    assert closed == pytest.approx(logits, rel=0.02)
    assert traced == pytest.approx(logits, rel=0.02)
