"""Public training jobs that adapters, quantisation, chats, packing and schedules made possible: each is planned."""

from pathlib import Path

import pytest

from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan

JOBS = sorted(Path(__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_job_is_planned(path: Path) -> None:
    """Its batch equation holds as its description says, its steps are known, and it fits the card that it ran on."""
    plan = make_plan(load_recipe(str(path)))
    batch = plan.batch
    factors = f"{batch.per_device} × {batch.gpus} × {batch.accumulation}"
    assert factors in plan.recipe.description
    stated = plan.recipe.description.partition(f" = {factors}")[0].rpartition(" ")[2]
    assert batch.effective == batch.per_device * batch.gpus * batch.accumulation
    assert not stated.isdigit() or int(stated) == batch.effective
    assert plan.steps.total > 0
    assert plan.memory.method == "closed-form"
    assert plan.memory.fits, f"{path.stem}: {plan.memory.device} of {plan.memory.capacity}"


def test_there_are_as_many_as_were_unblocked() -> None:
    """Jobs whose listed blockers are built: adapters, quantised bases, chats, packing, mixtures, pairs."""
    assert len(JOBS) >= 25
