"""torchrun's rendered command: full text, and hostile names stay one argument."""

import shlex
from pathlib import Path

import pytest

from launchers import LAUNCHERS
from launchers.base import Job
from toolkit.plan.resolve import resolve
from toolkit.recipe.load import load_recipe

GOLDEN = """\
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false /usr/bin/python3 -m torch.distributed.run --nnodes=1 \
--nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --max-restarts=0 \
-m toolkit.train.worker --plan /runs/a/plan-0.json --run-dir /runs/a --attempt 0"""


def test_the_whole_command() -> None:
    """Every word of it, so that a change is seen."""
    job = Job(Path("/runs/a/plan-0.json"), Path("/runs/a"), 0, "/usr/bin/python3")
    assert LAUNCHERS["torchrun"](resolve(load_recipe("tiny-code-lm")), job).to_shell() == GOLDEN


@pytest.mark.parametrize(
    "name", ["a'; echo x", "with space", "new\nline", "$(touch x)", "../up", "--nnodes=9"]
)
def test_hostile_names_stay_one_argument(name: str) -> None:
    """A path is never read by a shell as anything but itself."""
    folder = Path("/runs") / name
    job = Job(folder / "plan-0.json", folder, 0, "/usr/bin/python3")
    command = LAUNCHERS["torchrun"](resolve(load_recipe("tiny-code-lm")), job)
    assert shlex.split(command.to_shell())[4:] == command.argv
    assert command.argv[command.argv.index("--run-dir") + 1] == str(folder)
