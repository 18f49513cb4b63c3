"""The three real launchers: how each dies, what verify and export say of a real run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from safetensors.torch import load_file
from test_runs import slow_recipe, start, steps, wait_for

from conftest import SOURCES, tiny_recipe
from drumline.checkpoint.manifest import verify
from drumline.checkpoint.retention import find_checkpoints
from drumline.plan.resolve import resolve
from drumline.processes import Process
from drumline.rank_files import RankFiles
from drumline.recipe.load import validate
from drumline_launchers import LAUNCHERS

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

DEATHS = {
    "rank SIGKILL": (4, "rank 1 ended without a word"),
    "SIGTERM": (75, "stopped at step"),
    "SIGINT": (75, "stopped at step"),
    "launcher SIGKILL": (4, ""),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_how_each_launcher_dies(tmp_path: Path, launcher: str) -> None:
    """The exit code is the truth, no process stays behind, a checkpoint is there; in seconds."""
    strategy = {"deepspeed": ["strategy.name=zero2"]}.get(launcher, [])
    recipe = slow_recipe(tmp_path, 2)
    overrides = [
        f"launch.launcher={launcher}",
        *strategy,
        "checkpoint.every_steps=2",
        "duration.steps=400",
    ]
    for death, (code, words) in DEATHS.items():
        if launcher == "accelerate" and death.startswith("SIG"):
            continue  # its launcher is torchrun's agent, which has its turn
        if launcher == "deepspeed" and death == "SIGINT":
            continue  # to the supervisor it is a signal as SIGTERM is
        run = tmp_path / death.replace(" ", "-")
        process = start(tmp_path, "run", recipe, *overrides, "--run-dir", str(run))
        wait_for(lambda run=run: find_checkpoints(run / "checkpoints"), process)
        logs = run / "logs/attempt-0"
        ranks = [RankFiles(logs, rank).process() for rank in (0, 1)]
        assert all(ranks)
        began = time.monotonic()
        if death == "rank SIGKILL":
            ranks[1].send(signal.SIGKILL)  # type: ignore[union-attr]
        elif death == "launcher SIGKILL":
            os.kill(child_of(process.pid), signal.SIGKILL)
        else:
            process.send_signal(signal.Signals[death])
        _, err = process.communicate(timeout=60)
        seconds = time.monotonic() - began
        print(f"{launcher:<11} {death:<17} {seconds:>5.1f} s, exit {process.returncode}")
        assert process.returncode == code, err
        assert words in err
        assert seconds < 20
        assert not any(isinstance(rank, Process) and rank.is_alive for rank in ranks)
        assert not left_behind(run)
        newest = find_checkpoints(run / "checkpoints")[-1]
        assert verify(newest).step >= 2
        if code == 75:
            assert verify(newest).step == steps(run)[-1]["step"]


def child_of(pid: int) -> int:
    """The launcher: the one child of the command that is not itself."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(text) == 1
    return int(text[0])


def left_behind(run: Path) -> list[str]:
    """Processes that still name the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(run) in words and path.parent.name != str(os.getpid()):
            found.append(words)
    return found


@pytest.mark.parametrize(("world", "rank"), [("1", "0"), ("4", "1")])
def test_a_worker_refuses_another_world_than_its_plans(
    tmp_path: Path, world: str, rank: str
) -> None:
    """A launcher that silently starts one process, or too many: said at once, exit code 2."""
    plan = resolve(validate(tiny_recipe(), "r"))
    (tmp_path / "logs/attempt-0").mkdir(parents=True)
    (tmp_path / "plan-0.json").write_text(plan.to_json())
    env = {**os.environ, "PYTHONPATH": SOURCES, "RANK": rank, "WORLD_SIZE": world}
    done = subprocess.run(
        [sys.executable, "-m", "drumline.train.worker", "--plan", "plan-0.json", "--run-dir", "."],
        cwd=tmp_path, env=env, timeout=30,
    )  # fmt: skip
    outcome = RankFiles(tmp_path / "logs/attempt-0", int(rank)).outcome()
    assert done.returncode == 1
    assert outcome
    assert outcome["exit_code"] == 2
    assert outcome["message"] == f"the plan names 2 ranks, the launcher started {world}"


TINY = ["data.options={max_files: 40}", "data.validation=0.05", "model.config.num_hidden_layers=2",
        "batch.effective=12", "batch.per_device=3", "duration.steps=4", "schedule.warmup_steps=1",
        "evaluation.every_steps=4", "checkpoint.every_steps=4"]  # fmt: skip


def test_verify_tells_equal_from_not_equal(
    drumline: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Through the real launcher: exit 0 and an error at fp32's rounding; BatchNorm is exit 5."""
    done = drumline("verify", "tiny-code-lm", *TINY, "launch.launcher=deepspeed", "strategy.name=zero3",
                    "--layers", "1", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"]
    assert all(step["relative_error"] < 1e-6 for step in found["steps"])
    cnn = ("verify", "cnn-batchnorm")
    done = fork_server.run(tmp_path, *cnn, "evaluation=null", "early_stopping=null")
    assert done.returncode == 5, done.stderr
    assert "NOT EQUAL" in done.stdout
    done = fork_server.run(tmp_path, *cnn, "--layers", "1")
    assert done.returncode == 2
    assert "a factory's model has no known layers" in done.stderr


def test_bitwise_verification(fork_server: ForkServer, tmp_path: Path) -> None:
    """One gradient per sample in slot order: the same SHA-256 of the weights for two ranks and for one."""
    done = fork_server.run(tmp_path, "verify", "tiny-code-lm", *TINY, "--bitwise", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["sha256"]) == ["3 per_device × 2 gpus × 2 accumulation",
                                     "1 per_device × 1 gpus × 12 accumulation"]  # fmt: skip
    assert len(set(found["sha256"].values())) == 1


def test_a_dry_run_can_be_pasted(drumline: Any, tmp_path: Path) -> None:
    """What `run --dry-run` prints, given to a shell, trains: the folders, the plan, the files, the start."""
    drumline("prepare", "tiny-code-lm", *TINY)
    shown = drumline("run", "tiny-code-lm", *TINY, "launch.launcher=accelerate", "--dry-run", "--run-dir", "it's here",
                     "--rendezvous", "127.0.0.1:29533")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    env = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(
        ["sh", "-e"], input=shown.stdout, cwd=tmp_path, env=env, text=True, timeout=120
    )
    assert done.returncode == 0
    assert [line["step"] for line in steps(tmp_path / "it's here")] == [1, 2, 3, 4]


def test_export_gives_what_transformers_loads(
    drumline: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Trained under ZeRO-3 on two ranks, exported, loaded by name: the same loss as the run's evaluation."""
    done = drumline("run", "tiny-code-lm", *TINY, "launch.launcher=deepspeed", "strategy.name=zero3",
                    "--run-dir", "r", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss = json.loads(done.stdout)["eval"]["eval/loss"]
    done = fork_server.run(tmp_path, "export", "r", "model")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "model").iterdir())[0] == "config.json"
    assert load_file(tmp_path / "model/model.safetensors")
    again = fork_server.run(tmp_path, "export", "r", "model")
    assert again.returncode == 2
    assert "is not an empty folder" in again.stderr

    import numpy as np
    from transformers import AutoModelForCausalLM

    from drumline.plan.model import read_plan
    from drumline.train.batches import micro_batch_tensors, open_rows
    from drumline.train.objectives import ObjectiveModule
    from drumline.train.objectives.cross_entropy import TokenCrossEntropy

    plan = read_plan((tmp_path / "r/plan-0.json").read_text())
    rows = open_rows(plan, "validation")
    module = ObjectiveModule(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), TokenCrossEntropy()
    ).eval()
    with torch.no_grad():
        total = sum(
            float(module(micro_batch_tensors(rows, np.arange(n, n + 1), False, False))[0])
            for n in range(len(rows))
        )
    assert total / int(rows.counts.sum()) == pytest.approx(loss, rel=1e-5)
    _assert_it_generates(tmp_path / "model")


def _assert_it_generates(folder: Path) -> None:
    """With its own tokenizer and end token, transformers writes what the model's logits say, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert (model.config.use_cache, model.config.eos_token_id, tokenizer.eos_token_id) == (
        True,
        256,
        256,
    )
    ids = torch.tensor([list(b"def ")])
    assert tokenizer("def ", return_tensors="pt").input_ids.tolist() == ids.tolist()
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)
    while ids.shape[1] < written.shape[1]:
        with torch.no_grad():
            following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    assert written.tolist() == ids.tolist()


def test_reproduced_through_another_launcher(
    drumline: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Logged under torchrun, trained again under DeepSpeed's ZeRO-2 and under torchrun alone: the verdicts."""
    done = fork_server.run(
        tmp_path, "run", "tiny-code-lm", *TINY, "duration.steps=8", "--run-dir", "r"
    )
    assert done.returncode == 0, done.stderr
    zero = ["launch.launcher=deepspeed", "strategy.name=zero2"]
    for arguments, verdict in (([], "identical"), (zero, "equal")):
        done = drumline("reproduce", "r", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["verdict"], found["steps"]) == (verdict, 8)
        assert found["loss_error"] < 1e-5
        assert found["weights_error"] < 1e-5
