"""`evaluation.after`: commands on saved checkpoints, once for each step, also across signals and kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from advice import heard
from conftest import ROOT, tiny_recipe
from drumline.after_files import numbers_in
from drumline.errors import DrumlineError
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12
from drumline.recipe.load import validate

pytestmark = [pytest.mark.xdist_group("survival")]

SCRIPT = """
import json, os, sys, time
place = os.path.dirname(os.path.abspath(__file__))
with open(f"{place}/begun.txt", "a") as file:
    print(sys.argv[1], file=file)
shards = sorted(name for name in os.listdir(os.environ["DRUMLINE_CHECKPOINT"]) if name.endswith(".safetensors"))
is_first = len(open(f"{place}/begun.txt").readlines()) == 1
time.sleep(float(sys.argv[3] if is_first and len(sys.argv) > 3 else sys.argv[2]))
assert sorted(name for name in os.listdir(os.environ["DRUMLINE_CHECKPOINT"]) if name.endswith(".safetensors")) == shards
with open(f"{place}/ran.txt", "a") as file:
    print(sys.argv[1], file=file)
with open(os.environ["DRUMLINE_NUMBERS"], "w") as file:
    json.dump({"shards": len(shards), "of": {"step": int(os.environ["DRUMLINE_STEP"])}}, file)
"""


def recipe(folder: Path, *after: dict[str, Any], **sections: Any) -> str:
    """Thirty quick steps, of which the commands are told; checkpoints at others than theirs, one kept."""
    (folder / "count.py").write_text(SCRIPT)
    defaults: dict[str, Any] = {
        "project": str(folder),
        "duration": {"steps": 30},
        "batch": {"effective": 24, "per_device": 4, "gpus": 2},
        "evaluation": {"every_steps": 15, "per_device": 200, "after": list(after)},
        "checkpoint": {"every_steps": 7, "keep_last": 1, "keep_best": 0},
        "logging": {"every_steps": 1},
    }  # fmt: skip
    plain = tiny_recipe(**{**defaults, **sections})
    (folder / "example_models.py").write_text((ROOT / "recipes/example_models.py").read_text())
    (folder / "r.yaml").write_text(yaml12.dump(plain))
    return "r.yaml"


def counting(seconds: float = 0.0, first: float | None = None, **more: Any) -> dict[str, Any]:
    """A command that takes so long; the one that is begun first may take longer."""
    times = [str(seconds), *([str(first)] if first else [])]
    return {"name": "count", "every_steps": 10, "run": [sys.executable, "count.py", "{step}", *times], **more}  # fmt: skip


def ran(folder: Path, name: str = "ran") -> list[int]:
    path = folder / f"{name}.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def told(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and values of the lines that commands have in the metrics."""
    lines = read_metrics(folder / "r/metrics.jsonl")
    return [(line["step"], {k: v for k, v in line.items() if k.startswith("after/")}) for line in lines if any(k.startswith("after/") for k in line)]  # fmt: skip


def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


WANTED = [(step, {"after/count/shards": 2, "after/count/of/step": step, "after/count/exit_code": 0}) for step in (10, 20, 30)]  # fmt: skip


def test_each_checkpoint_is_read_once(tmp_path: Path, forked: Any) -> None:
    """Saved for the command and kept until it has ended, then deleted; numbers in metrics, report and output."""
    done = forked("run", recipe(tmp_path, counting(1.0)), "--run-dir", "r")
    assert done.returncode == 0, done.stderr
    assert ran(tmp_path) == [10, 20, 30]
    assert told(tmp_path) == WANTED
    assert "step 20: count shards 2, of/step 20" in done.stderr
    assert [path.name for path in (tmp_path / "r/checkpoints").iterdir()] == ["step-00000030"]
    assert forked("report", "r").returncode == 0
    assert "shards 2, of/step 20" in (tmp_path / "r/report.html").read_text()
    again = forked("resume", "r")
    assert ran(tmp_path) == [10, 20, 30], again.stderr


@pytest.mark.parametrize("way", ["signal", "kill"])
def test_what_was_stopped_is_run_again(tmp_path: Path, fork_server: ForkServer, way: str) -> None:
    """SIGTERM while a command runs, or SIGKILL of the supervisor: begun again, ended once, and no orphan is left."""
    child = fork_server.drumline(
        tmp_path, "run", recipe(tmp_path, counting(0.3, first=60.0)), "--run-dir", "r"
    )
    until(lambda: ran(tmp_path, "begun") != [])
    os.kill(child.pid, signal.SIGTERM if way == "signal" else signal.SIGKILL)
    code = child.wait(120)
    assert code == (75 if way == "signal" else -9), child.err
    if way == "signal":
        assert not any("count.py" in line for line in processes(tmp_path))
    until(lambda: not ranks_alive(tmp_path))
    resumed = fork_server.run(tmp_path, "resume", "r", timeout=180)
    assert resumed.returncode == 0, resumed.stderr
    assert ran(tmp_path) == [10, 20, 30]
    assert len(ran(tmp_path, "begun")) == 4
    assert told(tmp_path) == WANTED
    assert not any("count.py" in line for line in processes(tmp_path))


def processes(folder: Path) -> list[str]:
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in shown.stdout.splitlines() if str(folder) in line or "count.py" in line]


def ranks_alive(folder: Path) -> bool:
    from drumline.processes import Process

    found = [Process.parse(path.read_text()) for path in folder.glob("r/logs/attempt-*/rank-*.pid")]
    return any(process and process.is_alive for process in found)


def test_a_command_that_fails_stops_nothing(tmp_path: Path, forked: Any) -> None:
    """A wrong exit code, no such command, one that takes too long: told, not repeated, and the run goes on."""
    after = [
        {"name": "wrong", "every_steps": 15, "run": ["sh", "-c", "echo '{\"half\": 0.5}'; exit 3"]},
        {"name": "none", "every_steps": 15, "run": ["/no/such/command"]},
        {"name": "slow", "every_steps": 30, "run": ["sleep", "60"], "timeout_minutes": 0.01},
    ]
    done = forked("run", recipe(tmp_path, *after), "--run-dir", "r", "--json")
    assert done.returncode == 0, done.stderr
    assert "step 15: wrong failed (exit code 3)" in done.stderr
    assert "none: No such file or directory: /no/such/command" in done.stderr
    assert "slow failed (took longer than timeout_minutes)" in done.stderr
    # What two commands of a step have told may be one line of the metrics or two: they end when they end.
    missing = [
        (step, values["after/none/exit_code"])
        for step, values in told(tmp_path)
        if "after/none/exit_code" in values
    ]
    assert missing == [(15, 127), (30, 127)]
    values = {step: values for step, values in told(tmp_path) if "after/wrong/half" in values}
    assert values == {step: {"after/wrong/half": 0.5, "after/wrong/exit_code": 3} for step in (15, 30)}  # fmt: skip


def test_commands_need_no_rows(tmp_path: Path, forked: Any) -> None:
    """A run without an evaluation of its own, whose words are filled in, without a shell."""
    after = {"name": "words", "every_epochs": 0.05, "run": ["printf", "%s\n", '{"step": {step}}']}
    data = {"validation": 0.0}
    name = recipe(tmp_path, evaluation={"after": [after]}, data=data, duration={"steps": 20})
    done = forked("run", name, "--run-dir", "r", "data.samples=4800")
    assert done.returncode == 0, done.stderr
    assert told(tmp_path) == [
        (step, {"after/words/step": step, "after/words/exit_code": 0}) for step in (10, 20)
    ]


def test_commands_of_others_are_not_run(tmp_path: Path, forked: Any) -> None:
    """A record that names one is reproduced with --trust-code only."""
    done = forked("run", recipe(tmp_path, counting(), model=ViT, data=PIXELS), "--run-dir", "r", "duration.steps=10")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = forked("reproduce", "r", "--steps", "2")
    assert found.returncode == 2
    heard("the record names code to run", found.stderr)
    assert "count.py" in found.stderr


ViT = {"source": "config", "factory": None, "architecture": "vit", "config": {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}}  # fmt: skip
PIXELS = {"name": "synthetic-shapes", "options": {"rows": 300}, "samples": None, "image_field": "image",
          "image": {"size": 16}, "workers": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([counting(every_epochs=1)], "exactly one of every_steps and every_epochs; given: both"),
        ([{"name": "a", "run": ["x"]}], "exactly one of every_steps and every_epochs; given: neither"),
        ([{"every_steps": 1, "run": []}], "at least 1 item"),
        ([counting(), counting()], "two commands are called count. Nearest: a name for each"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_command_is_refused(tmp_path: Path, after: list[Any], words: str) -> None:
    """In the recipe."""
    with pytest.raises(DrumlineError, match=words.replace("(", r"\(")):
        validate(yaml12.parse((tmp_path / recipe(tmp_path, *after)).read_text()), "r")
    assert validate(yaml12.parse((tmp_path / recipe(tmp_path, counting())).read_text()), "r").after


def test_numbers_of_a_command(tmp_path: Path) -> None:
    """From its file, else from its last line; what is no finite number is left out."""
    numbers, log = tmp_path / "numbers", tmp_path / "log"
    log.write_text(
        'loading\n{"acc": 0.5, "task": {"f1": 1, "name": "x"}, "ok": true, "bad": NaN}\n'
    )
    assert numbers_in(numbers, log) == {"acc": 0.5, "task/f1": 1}
    numbers.write_text('{"acc": 2}')
    assert numbers_in(numbers, log) == {"acc": 2}
    numbers.write_text('{"huge": 1' + 400 * "0" + ', "acc": 2}')
    assert numbers_in(numbers, log) == {"acc": 2}
    numbers.write_text(200_000 * '{"a":')
    assert numbers_in(numbers, log) == {}
    numbers.write_text("[1]")
    assert numbers_in(numbers, log) == {}
    log.write_text("no numbers\n")
    numbers.unlink()
    assert numbers_in(numbers, log) == {}
