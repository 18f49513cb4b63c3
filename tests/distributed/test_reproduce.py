"""A logged run, trained again from whatever was kept of it, and the verdict, through the real command."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import Child, ForkServer

from conftest import ROOT, tiny_recipe
from drumline.checkpoint.manifest import verify
from drumline.metrics_file import read_metrics
from drumline.recipe import yaml12

pytestmark = [pytest.mark.xdist_group("reproduce")]

STEPS = 20
TRUST = "--trust-code"
"""The small recipe's model is a factory."""


def write_recipe(folder: Path, **sections: Any) -> str:
    """Twenty quick steps on two ranks."""
    defaults: dict[str, Any] = {
        "duration": {"steps": STEPS},
        "batch": {"effective": 24, "per_device": 4, "gpus": 2},
        "checkpoint": {"every_steps": 5, "keep_last": 9},
        "logging": {"every_steps": 1},
        "schedule": {"name": "cosine", "warmup_steps": 3},
    }
    for name, values in sections.items():
        both = isinstance(values, dict) and isinstance(defaults.get(name), dict)
        defaults[name] = {**defaults[name], **values} if both else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.yaml").write_text(yaml12.dump(tiny_recipe(**defaults)))
    return "r.yaml"


def run(fork_server: ForkServer, folder: Path, name: str = "r", **sections: Any) -> Path:
    """`drumline run` to its end."""
    child = fork_server.drumline(folder, "run", write_recipe(folder, **sections), "--run-dir", name)
    assert child.wait() == 0, child.err
    return folder / name


def reproduce(
    fork_server: ForkServer, folder: Path, *arguments: str, code: int = 0
) -> tuple[dict[str, Any], Child]:
    """`drumline reproduce --json`; the object, and the process."""
    child = fork_server.drumline(folder, "reproduce", *arguments, "--json")
    assert child.wait() == code, child.err
    return json.loads(child.out) if code in (0, 5) else {}, child


@pytest.fixture(scope="module")
def original(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is reproduced; nobody may change it."""
    return run(fork_server, tmp_path_factory.mktemp("original"))


def step_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path / "metrics.jsonl") if "lr" in line]


def record_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "record.json").read_text())  # type: ignore[no-any-return]


def test_at_the_same_split_it_is_identical(
    fork_server: ForkServer, original: Path, tmp_path: Path
) -> None:
    """The weights' SHA-256 is the original's; the new run names its parent and its verdict."""
    found, child = reproduce(fork_server, tmp_path, str(original), TRUST)
    assert found["words"] == f"identical: {STEPS} steps and the final weights, bit for bit"
    assert "nothing that was recorded differs here" in child.err
    ours, theirs = record_of(Path(found["run"])), record_of(original)
    assert ours["weights"] == theirs["weights"]
    assert ours["weights"]["elements"] == 32 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert ours["parent"]["run"] == str(original)
    assert ours["reproduced"]["verdict"] == "identical"


@pytest.mark.parametrize("gpus", [1, 4])
def test_at_another_split_it_is_equal(
    fork_server: ForkServer, original: Path, tmp_path: Path, gpus: int
) -> None:
    """Losses and weights within 1e-5, the same samples and rates."""
    found, _ = reproduce(fork_server, tmp_path, str(original), TRUST, "--gpus", str(gpus))
    assert found["verdict"] == "equal"
    assert found["loss_error"] < 1e-5
    assert 0 < found["weights_error"] < 1e-5
    assert found["recipe"]["batch.gpus"] == [2, gpus]


def test_from_what_was_kept(fork_server: ForkServer, original: Path, tmp_path: Path) -> None:
    """recipe.yaml alone, a checkpoint alone, a checkpoint in its run; also only the first steps."""
    shutil.copy(original / "recipe.yaml", tmp_path / "kept.yaml")
    found, _ = reproduce(fork_server, tmp_path, "kept.yaml", TRUST)
    assert found["words"] == f"identical: {STEPS} steps and the final weights, bit for bit"
    shutil.copytree(original / "checkpoints/step-00000010", tmp_path / "alone")
    found, _ = reproduce(fork_server, tmp_path, "alone", TRUST)
    assert (found["verdict"], found["steps"], found["weights_error"]) == ("identical", 0, 0.0)
    assert record_of(Path(found["run"]))["weights"]["step"] == 10
    found, _ = reproduce(
        fork_server, tmp_path, str(original / "checkpoints/step-00000015"), TRUST, "--gpus", "1"
    )
    assert (found["verdict"], found["steps"]) == ("equal", 15)
    found, _ = reproduce(fork_server, tmp_path, str(original), TRUST, "--steps", "7")
    assert (found["verdict"], found["steps"], found["weights_error"]) == ("identical", 7, None)
    rates = [
        line["lr"] for line in read_metrics(Path(found["run"]) / "metrics.jsonl") if "lr" in line
    ]
    assert (
        rates
        == [line["lr"] for line in read_metrics(original / "metrics.jsonl") if "lr" in line][:7]
    )


def test_from_the_wandb_file_alone(fork_server: ForkServer, tmp_path: Path) -> None:
    """The run folder deleted: the offline file is enough, at the same split and at another."""
    path = run(fork_server, tmp_path, logging={"wandb": {"project": "p"}})
    file = shutil.copy(next(path.rglob("*.wandb")), tmp_path)
    shutil.rmtree(path)
    found, _ = reproduce(fork_server, tmp_path, file, TRUST)
    assert found["words"] == f"identical: {STEPS} steps and the final weights, bit for bit"
    assert not list(Path(found["run"]).glob("wandb"))  # nothing is logged into somebody's project
    found, _ = reproduce(fork_server, tmp_path, file, TRUST, "--gpus", "4")
    assert (found["verdict"], found["steps"]) == ("equal", STEPS)
    assert 0 < found["weights_error"] < 1e-5


def test_what_is_refused(fork_server: ForkServer, original: Path, tmp_path: Path) -> None:
    """Foreign code, another training, an edited record, too many steps: exit 2, and nothing is left."""
    copy = tmp_path / "edited"
    shutil.copytree(original, copy)
    record = record_of(copy)
    record["recipe"]["seed"] = 6
    (copy / "record.json").write_text(json.dumps(record))
    for arguments, words in (
        ([str(original)], "names code to run: example_models:mlp"),
        ([str(original), "--code"], "needs --trust-code"),
        ([str(original), TRUST, "seed=6"], "seed=6 would make it another training"),
        ([str(original), TRUST, "optimizer.lr=1e-2"], "would make it another training"),
        ([str(copy), TRUST], "its recipe has been changed since it ran"),
        ([str(original), TRUST, "--steps", "21"], "the run has 20 steps"),
        (["nowhere"], "nowhere: does not exist"),
        ([str(tmp_path)], "neither a run folder"),
        (["r.yaml", TRUST], "it does not say what came out"),
    ):
        write_recipe(tmp_path)
        _, child = reproduce(fork_server, tmp_path, *arguments, code=2)
        assert words in child.err
        assert not list(tmp_path.glob("runs/*")), arguments


def test_another_seed_or_rate_is_named_by_compare(
    fork_server: ForkServer, original: Path, tmp_path: Path
) -> None:
    """The first step, the key with both values, and for another order the samples' indices."""
    for sections, step, words in (
        ({"seed": 6}, 1, "seed 5 became 6"),
        ({"optimizer": {"name": "adamw", "lr": 2e-3}}, 1, "optimizer.lr 0.001 became 0.002"),
        (
            {"schedule": {"name": "cosine", "warmup_steps": 4}},
            1,
            "schedule.warmup_steps 3 became 4",
        ),
        ({"precision": "bf16"}, 1, "precision fp32 became bf16"),
    ):
        name = words.split()[0]
        other = run(fork_server, tmp_path / name, **sections)
        child = fork_server.drumline(tmp_path, "compare", str(original), str(other))
        assert child.wait() == 5, child.err
        last = child.out.strip().splitlines()[-1]
        assert last.startswith(f"diverged at step {step} because "), last
        assert words in last
    child = fork_server.drumline(
        tmp_path, "compare", str(original), str(tmp_path / "seed/r"), "--json"
    )
    assert child.wait() == 5
    indices = json.loads(child.out)["indices"]
    assert len(indices["a"]) == len(indices["b"]) == 24
    assert indices["a"] != indices["b"]


def test_an_altered_row_is_refused_with_both_hashes(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """One digit in one row: exit 2; with --changed-data it diverges, because of the data."""
    rows = [{"text": f"row {n} " + "abc" * 9, "label": n % 3} for n in range(60)]
    data = {"source": "files", "name": None, "path": "rows.jsonl", "task": "causal_lm", "samples": None,
            "validation": 0.0, "sequence_length": 16}  # fmt: skip
    model = {"source": "config", "factory": None, "architecture": "llama", "config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 257}}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sections: dict[str, Any] = {"data": data, "model": model, "project": None, "duration": {"steps": 12},
                                "batch": {"effective": 24, "per_device": 4, "gpus": 2, "weighting": "token"}}  # fmt: skip
    first = run(fork_server, tmp_path, **sections)
    rows[31]["text"] = rows[31]["text"].replace("31", "37")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    _, child = reproduce(fork_server, tmp_path, str(first), code=2)
    was = record_of(first)["data"]["fingerprint"]
    assert f"the data have changed: fingerprint {was} when the run was logged, sha256:" in child.err
    assert not list(tmp_path.glob("runs/*"))
    found, child = reproduce(fork_server, tmp_path, str(first), "--changed-data", code=5)
    assert found["first"]["what"] == "loss"
    assert found["because"][0].startswith(f"data {was[:40]}")


def test_changed_model_code_is_named_and_restored(fork_server: ForkServer, tmp_path: Path) -> None:
    """One line of the factory: shown before it starts, blamed after; with --code the run is identical."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "recipes/example_models.py", project)
    settings = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "."], [*settings, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(project), *arguments], check=True)
    text = (project / "example_models.py").read_text()
    (project / "example_models.py").write_text(text.replace("Two hidden layers", "Two layers"))
    first = run(fork_server, project, project=str(project))
    (project / "example_models.py").write_text(text.replace("nn.GELU(),", "nn.ReLU(),", 1))
    found, child = reproduce(fork_server, project, str(first), TRUST, code=5)
    assert "file example_models.py" in child.err.split("differs here:")[1]
    assert any(words.startswith("file example_models.py") for words in found["because"])
    found, child = reproduce(fork_server, project, str(first), TRUST, "--code")
    assert found["words"] == f"identical: {STEPS} steps and the final weights, bit for bit"
    assert "Two layers" in (Path(found["run"]) / "code/example_models.py").read_text()


def test_another_version_is_shown_and_blamed(
    fork_server: ForkServer, original: Path, tmp_path: Path
) -> None:
    """A record from another torch, whose losses came out otherwise: named before and after."""
    copy = tmp_path / "old"
    shutil.copytree(original, copy)
    record = record_of(copy)
    record["versions"]["torch"] = "2.9.1"
    (copy / "record.json").write_text(json.dumps(record))
    lines = step_lines(copy)
    for line in lines[4:]:
        line["loss"] *= 1.001
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found, child = reproduce(fork_server, tmp_path, str(copy), TRUST, code=5)
    assert "version of torch  2.9.1 -> 2.13.0" in child.err
    assert found["words"].startswith(
        "diverged at step 5 because version of torch 2.9.1 became 2.13.0"
    )


def test_dropout(fork_server: ForkServer, tmp_path: Path) -> None:
    """Masks follow from the step and the first slot: identical at the same split, others at another."""
    model = {"source": "config", "factory": None, "architecture": "gpt2", "config": {
        "vocab_size": 257, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}}  # fmt: skip
    data = {"name": "python-stdlib", "task": "causal_lm", "samples": None, "validation": 0.0, "sequence_length": 32,
            "options": {"max_files": 10}}  # fmt: skip
    first = run(fork_server, tmp_path, model=model, data=data, project=None,
                batch={"effective": 24, "per_device": 4, "gpus": 2, "weighting": "token"})  # fmt: skip
    found, child = reproduce(fork_server, tmp_path, str(first))
    assert found["verdict"] == "identical"
    found, child = reproduce(
        fork_server, tmp_path, str(first), "batch.per_device=12", "batch.accumulation=1", code=5
    )
    assert found["words"].startswith("diverged at step 1 because batch.per_device 4 became 12")
    assert "split      none: " in child.err


def test_no_secret_is_ever_written(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in environment, arguments, code and recipe: refused or left out of every file written."""
    planted = ["envsecret-0123456789", "argsecret-0123456789", "hf_codesecret0123456789abcdef"]
    monkeypatch.setenv("MY_SERVICE_TOKEN", planted[0])
    shutil.copy(ROOT / "recipes/example_models.py", tmp_path)
    write_recipe(tmp_path, project=".", logging={"wandb": {"project": "p"}, "tensorboard": True})
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "notes.py").write_text(f"KEY = '{planted[2]}'\n")
    child = fork_server.drumline(tmp_path, "run", "r.yaml", f"description=holds {planted[0]}")
    assert child.wait() == 2
    assert "it holds a secret of this environment" in child.err
    child = fork_server.drumline(tmp_path, "run", "r.yaml", f"data.options.api_key={planted[1]}")
    assert child.wait() == 2
    assert "data.options.api_key: secrets do not belong in a recipe" in child.err
    assert not list(tmp_path.glob("runs/*"))
    child = fork_server.drumline(tmp_path, "run", "r.yaml", "--run-dir", "r")
    assert child.wait() == 0, child.err
    assert "dropped" not in child.err
    written = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert record_of(tmp_path / "r")["code"]["left_out"]["notes.py"] == "holds a secret"
    for path in written:
        raw = path.read_bytes()
        for secret in planted:
            assert secret.encode() not in raw, path


def test_many_kills(fork_server: ForkServer, tmp_path: Path) -> None:
    """The command and its ranks killed at any moment: record and metrics are readable, and it resumes.

    Thirty kills of runs that are resumed each time, more where few met a step; each run that gets to its end is bitwise the straight one.
    """
    sections: dict[str, Any] = {
        "duration": {"steps": 60},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
    }
    began = time.monotonic()
    straight = run(fork_server, tmp_path, "straight", **sections)
    whole_s = time.monotonic() - began
    draw, kills, halfway, path = random.Random(3), 0, 0, tmp_path / "r"
    first = ("run", write_recipe(tmp_path, **sections), "--run-dir", "r")
    child = fork_server.drumline(tmp_path, *first)
    while kills < 30 or (halfway < 8 and kills < 90):
        kills += 1
        while not wait_or_kill(child, draw.uniform(0.02, 0.9 * whole_s)):  # ended before the kill
            code = child.wait()
            if code == 4:  # it had made steps and no save: it never begins anew in silence
                assert "resume --from-scratch" in child.err
                child = fork_server.drumline(tmp_path, "resume", "r", "--from-scratch")
                continue
            assert code == 0, child.err
            assert_as_if_never_killed(path, straight)
            shutil.rmtree(path)
            child = fork_server.drumline(tmp_path, *first)
        if not (path / "record.json").exists():  # killed before there was a run at all
            shutil.rmtree(path, ignore_errors=True)
            child = fork_server.drumline(tmp_path, *first)
            continue
        lines = step_lines(path)
        halfway += bool(lines)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert record_of(path)["recipe_sha256"] == record_of(straight)["recipe_sha256"]
        if record_of(path)["outcome"] == "finished" and record_of(path)["weights"]:
            assert_as_if_never_killed(path, straight)  # killed when all was done
            shutil.rmtree(path)
            child = fork_server.drumline(tmp_path, *first)
            continue
        child = fork_server.drumline(tmp_path, "resume", "r")
    code = child.wait()
    if code == 4:
        child = fork_server.drumline(tmp_path, "resume", "r", "--from-scratch")
        code = child.wait()
    assert code == 0, child.err
    assert_as_if_never_killed(path, straight)
    assert halfway >= 8


def wait_or_kill(child: Child, seconds: float) -> bool:
    """Whether it had to be killed."""
    deadline = time.monotonic() + seconds
    while child.is_running():
        if time.monotonic() > deadline:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.01)
    return False


def assert_as_if_never_killed(path: Path, straight: Path) -> None:
    """The weights to the last bit, every step told once and alike, the last checkpoint sound."""
    assert record_of(path)["weights"] == record_of(straight)["weights"]
    told = [step_lines(run) for run in (straight, path)]
    keys = ("step", "loss", "lr", "digest")
    assert [[line[k] for k in keys] for line in told[0]] == [
        [line[k] for k in keys] for line in told[1]
    ]
    assert verify(path / "checkpoints/step-00000060").step == 60


def test_the_table_of_runs(fork_server: ForkServer, original: Path, tmp_path: Path) -> None:
    """State, steps, loss, batch and split of each; filters; the same as JSON."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copytree(original, runs / "a")
    record = record_of(original)
    record["attempts"][0]["outcome"] = "failed"
    shutil.copytree(original, runs / "b")
    (runs / "b/record.json").write_text(json.dumps(record))
    (runs / "broken").mkdir()
    (runs / "broken/record.json").write_text("{")
    child = fork_server.drumline(tmp_path, "runs", "--json")
    assert child.wait() == 0, child.err
    rows = json.loads(child.out)["runs"]
    assert {Path(row["run"]).name: row["state"] for row in rows} == {"a": "finished", "b": "failed"}
    assert all(
        row["step"] == STEPS and row["split"] == [4, 2, 3] and row["effective"] == 24
        for row in rows
    )
    child = fork_server.drumline(tmp_path, "runs", "--state", "failed")
    assert child.wait() == 0
    _, row = child.out.strip().splitlines()
    assert row.split()[:2] == ["b", "failed"]
    assert fork_server.drumline(tmp_path, "runs", "--state", "wrong").wait() == 2
    assert fork_server.drumline(tmp_path, "runs", "nowhere").wait() == 2
