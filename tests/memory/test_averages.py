"""What an average of the weights costs: 4 bytes for each one that is trained, in the plan as in real steps."""

from typing import Any

import pytest

from drumline.recipe.load import merge
from memory.family_grid import Cell, _trace, diagonal
from memory.plans import small_plan

EMA: dict[str, Any] = {"ema": {"decay": 0.999}}


def test_the_closed_form_is_the_trace() -> None:
    """Three combinations, within 0.5 %."""
    for one in diagonal():
        sections = merge(one, EMA)
        plan = small_plan("llama", **sections)
        assert abs(Cell("llama", sections, plan, _trace(plan, "llama")).error) <= 0.005


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero3"])
def test_an_average_is_kept_like_an_optimizer_s_state(strategy: str) -> None:
    """Sharded where that is; in checkpoints as well."""
    launcher = "deepspeed" if strategy.startswith("zero") else "torchrun"
    changes = {"strategy": {"name": strategy}, "launch": {"launcher": launcher}}
    plain, kept = (small_plan("llama", **merge(changes, more)) for more in ({}, EMA))
    assert plain.cost.parameters
    assert plain.cost.checkpoint_bytes
    share = plain.cost.parameters * 4
    own = share if strategy == "ddp" else share // plain.batch.gpus
    more = kept.memory.parts["optimizer"] - plain.memory.parts["optimizer"]
    assert more == pytest.approx(own, rel=0.02)
    assert kept.cost.checkpoint_bytes == plain.cost.checkpoint_bytes + share
