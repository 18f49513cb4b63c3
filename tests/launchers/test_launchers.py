"""What every launcher renders: full text, on one node and many, and hostile names stay themselves."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import tiny_recipe
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe.load import load_recipe, validate
from drumline.runs.folder import RunFolder
from drumline.session.launch import render_alone
from drumline_launchers import LAUNCHERS
from drumline_launchers.base import Job

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, tuple[str, list[str], int]] = {
    "torchrun": ("tiny-code-lm", [], 0),
    "torchrun-8-nodes": ("llama-8b-8xh100", ["batch.gpus=64", "batch.accumulation=null"], 5),
    "accelerate": ("tiny-code-lm", ["launch.launcher=accelerate"], 0),
    "accelerate-one-process": (
        "tiny-code-lm",
        ["launch.launcher=accelerate", "batch.gpus=1", "batch.accumulation=null"],
        0,
    ),
    "accelerate-8-nodes": (
        "llama-8b-8xh100",
        ["launch.launcher=accelerate", "batch.gpus=64", "batch.accumulation=null"],
        5,
    ),
    "deepspeed": ("tiny-code-lm", ["launch.launcher=deepspeed"], 0),
    "deepspeed-zero3-8-nodes": (
        "llama-8b-8xh100",
        ["launch.launcher=deepspeed", "strategy={name: zero3, shard: all, offload: optimizer}",
         "batch.gpus=64", "batch.accumulation=null"],
        5,
    ),
}  # fmt: skip


def plan_of(case: str) -> Plan:
    recipe, overrides, _ = CASES[case]
    return resolve(load_recipe(recipe, overrides))


@pytest.mark.parametrize("case", CASES)
def test_the_whole_text(case: str, request: pytest.FixtureRequest) -> None:
    """Every word of it, so that a change is seen; `--rewrite-goldens` writes it anew."""
    plan, node_rank = plan_of(case), CASES[case][2]
    host = "node-0" if node_rank else "127.0.0.1"
    job = Job(
        Path("/runs/a/plan-0.json"), Path("/runs/a"), 0, "/usr/bin/python3", node_rank, host, 29500
    )
    text = LAUNCHERS[plan.recipe.launch.launcher](plan, job).to_shell() + "\n"
    golden = GOLDEN / f"{case}.txt"
    if request.config.getoption("--rewrite-goldens"):
        golden.write_text(text)
    assert text == golden.read_text()


HOSTILE = [
    "a'; echo x",
    "with space",
    "new\nline",
    "$(touch x)",
    "`touch x`",
    "../up",
    "--nnodes=9",
    '"',
    "ü%s\\n",
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_one_argument(launcher: str, name: str, tmp_path: Path) -> None:
    """A real shell reads a path as nothing but itself, in arguments and in the files it writes."""
    plan = plan_of(launcher)
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    show = "import sys, json; print(json.dumps(sys.argv[1:]))"
    job = Job(folder / "plan-0.json", folder, 0, "python3")
    command = LAUNCHERS[launcher](plan, job)
    shown = f"python3 -c {shlex.quote(show)}"
    text = command.to_shell().replace("python3 -P", f"{shown} -P", 1)
    done = subprocess.run(
        ["sh", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == command.argv[1:]
    assert command.argv[command.argv.index("--run-dir") + 1] == str(folder)
    for path, content in command.files.items():
        assert Path(path).read_text() == content
    assert not (tmp_path / "x").exists()


def test_a_local_start_meets_at_a_port_that_nobody_is_given(tmp_path: Path) -> None:
    """Not one of the system's own range, where another process may get it between choice and use."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    folder = RunFolder(tmp_path)
    plan = resolve(validate(tiny_recipe(), "r"))
    for number in range(20):
        words = " ".join(render_alone(plan, folder, number).argv)
        port = int(re.search(r"--rdzv-endpoint=127\.0\.0\.1:(\d+)", words)[1])  # type: ignore[index]
        assert not first <= port <= last
