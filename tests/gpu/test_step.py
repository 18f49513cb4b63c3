"""The training step on a GPU: no host synchronisation but the one read. Skipped where there is no GPU."""

import dataclasses
import os
from pathlib import Path

import pytest

from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.phases import Phase
from drumline.rank_files import Heartbeat
from drumline.recipe.load import validate
from drumline.session.planning import make_plan

torch = pytest.importorskip("torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_step_synchronises_once(tmp_path: Path) -> None:
    """With torch's synchronisation guard at "error" from each step's begin to its reduce, and the noise meter on.

    The same is counted on CPU tensors by tests/distributed/test_scale.py.
    """
    import torch.distributed as dist

    from drumline.train.loop import train
    from drumline.train.watch import Watch

    plain = tiny_recipe(batch={"gpus": 1, "accumulation": 4}, duration={"steps": 6})
    recipe = validate(plain, "r")
    prepare(recipe.data, recipe.project)
    plan = make_plan(recipe)
    logging = plan.recipe.logging.model_copy(update={"noise_scale": True})
    plan = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"logging": logging}))

    def entered(heartbeat: Heartbeat) -> None:
        inside = heartbeat.phase.is_in_a_step and heartbeat.phase is not Phase.REDUCING
        torch.cuda.set_sync_debug_mode("error" if inside and heartbeat.step > 1 else "default")

    os.environ.setdefault("LOCAL_RANK", "0")
    (tmp_path / "checkpoints").mkdir()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        outcome = train(plan, tmp_path, torch.device("cuda", 0), watch=Watch(heartbeat=entered))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    assert outcome.step == 6
