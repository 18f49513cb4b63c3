"""Runs that begin from others, by the command line: records, ancestors that are gone, heads, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from whole_tensors import whole_tensors

from advice import heard
from drumline.checkpoint.manifest import read_manifest, write_manifest

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.heavy]

LM = """
recipe: lm
schema: 1
model: {source: config, architecture: llama, config: {vocab_size: 257, hidden_size: 32, intermediate_size: 48,
        num_hidden_layers: 2, num_attention_heads: 4, pad_token_id: 0}}
data: {source: files, path: text.txt, task: causal_lm, sequence_length: 32}
batch: {effective: 8, per_device: 4, gpus: 2, accumulation: 1}
optimizer: {name: adamw, lr: 3.0e-3}
schedule: {name: wsd, decay_ratio: 0.5, horizon_steps: 100}
duration: {steps: 8}
checkpoint: {every_steps: 4}
"""
CLASSES = """
recipe: classes
extends: lm.yaml
data: {path: LABELS.jsonl, task: classification, sequence_length: 32}
schedule: {horizon_steps: null}
duration: {steps: 4}
"""


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in run.glob("logs/*/rank-*.log"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "lm.yaml").write_text(LM)
    for name, count in (("two", 2), ("five", 5)):
        rows = [{"text": f"row {n}", "label": n % count} for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(CLASSES.replace("LABELS", name))
    return tmp_path


def test_a_run_and_its_ancestors_are_reproduced(project: Path, forked: Any) -> None:
    """The decay of a WSD run branches off at step 4; it goes on twice, and only the last run is kept.

    Its record suffices to train both ancestors again, each to the step that was left, and then itself.
    """
    decay = ["schedule.horizon_steps=12", "schedule.decay_ratio=0.667", "duration.steps=10"]
    for words in (
        ("run", "lm.yaml", "--run-dir", "stable"),
        ("run", "lm.yaml", "--from", "stable@4", "start_from.what=state", *decay, "--run-dir", "decayed"),
        ("run", "decayed", "--from", "decayed", "start_from.what=state", "duration.steps=12", "--run-dir", "last"),
    ):  # fmt: skip
        done = forked(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    stable, decayed, last = (steps_of(project / name) for name in ("stable", "decayed", "last"))
    assert [line["step"] for line in decayed] == list(range(5, 11))
    assert [line["step"] for line in last] == [11, 12]
    assert [line["digest"] for line in decayed[:4]] == [line["digest"] for line in stable[4:]]
    assert [line["lr"] for line in decayed] == pytest.approx(
        [3e-3 * (12 - t) / 8 for t in range(5, 11)]
    )
    record = json.loads((project / "last/record.json").read_text())
    ancestry = record["ancestry"]
    assert [(Path(one["run"]).name, one["step"], one["what"]) for one in ancestry] == [
        ("stable", 4, "state"),
        ("decayed", 10, "state"),
    ]
    assert "the whole state of step 4 of" in forked("plan", "decayed").stdout
    assert record["plan"]["start"]["training_sha256"] == ancestry[1]["training_sha256"]

    done = forked("reproduce", "last", "--json")
    assert json.loads(done.stdout)["verdict"] == "identical"
    assert not list((project / "runs").glob("lm-2"))
    shutil.rmtree(project / "stable")
    shutil.rmtree(project / "decayed")
    shutil.rmtree(project / "runs")
    lone = project / "lone.yaml"
    shutil.copyfile(project / "last/recipe.yaml", lone)
    done = forked("reproduce", "lone.yaml", "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["verdict"] in ("equal", "identical")
    assert verdict["steps"] == 2
    assert done.stderr.count("is trained again first") == 2
    again = [steps_of(project / f"runs/lm-{n}") for n in (1, 2, 3)]
    assert [[line["step"] for line in lines] for lines in again] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8, 9, 10],
        [11, 12],
    ]

    text = lone.read_text()
    lone.write_text("\n".join(row for row in text.split("\n") if '{"ancestry"' not in row))
    told = heard("the record does not hold its recipe", forked("reproduce", "lone.yaml").stderr)
    assert "put that run folder back" in told
    lone.write_text(text)
    (project / "text.txt").write_text("other words " * 900)
    heard("have changed: fingerprint", forked("reproduce", "lone.yaml").stderr)


def test_a_head_that_is_new_or_has_grown_is_told_by_name(project: Path, forked: Any) -> None:
    """Two classes on a language model's body, five on that of two: the body is taken over, bit for bit."""
    still = ["optimizer.lr=1e-30"]
    for words in (
        ("run", "lm.yaml", "--run-dir", "lm"),
        ("run", "two.yaml", "--from", "lm", *still, "--run-dir", "two"),
        ("run", "five.yaml", "--from", "two", *still, "seed=5", "--run-dir", "five"),
    ):
        done = forked(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    first, grown = log_of(project / "two"), log_of(project / "five")
    assert "new weights, drawn from seed 0: model.score.weight (not there)" in first
    assert "not taken over, since this model has none: model.lm_head.weight" in first
    assert "model.score.weight ([2, 32] there and [5, 32] here)" in grown
    lm, two, five = (
        whole_tensors(project / name / f"checkpoints/step-{step:08d}", "model.")
        for name, step in (("lm", 8), ("two", 4), ("five", 4))
    )
    for name in lm.keys() - {"model.lm_head.weight"}:
        assert bool((lm[name] == two[name]).all() and (lm[name] == five[name]).all()), name
    assert not bool((two["model.score.weight"] == five["model.score.weight"][:2]).all())
    done = forked("run", "five.yaml", "--from", "two", "start_from.what=state", "duration.steps=8")
    assert done.returncode == 2
    assert "the weights of" in done.stderr


def test_what_no_run_can_begin_from_is_refused(project: Path, forked: Any) -> None:
    """Each refusal names what is there; its advice works when followed."""
    done = forked("run", "lm.yaml", "--run-dir", "lm")
    assert done.returncode == 0, done.stderr

    def told_of(*words: str) -> str:
        refused = forked("plan", "lm.yaml", *words)
        assert refused.returncode == 2, refused.stderr
        return str(refused.stderr)

    assert "does not exist" in told_of("--from", "nowhere")
    told = heard("has no checkpoint of step 5, but of 4, 8. Nearest: start_from.step=", told_of("--from", "lm@5"))  # fmt: skip
    assert "start_from.step=4" in told
    assert forked("plan", "lm.yaml", "--from", "lm", "start_from.step=4").returncode == 0
    one = "lm/checkpoints/step-00000004"
    told = heard("is of step 4. Nearest: start_from.run=", told_of("--from", f"{one}@8"))
    assert forked("plan", "lm.yaml", f"start_from.run={told.split('start_from.run=')[1].strip()}",
                  "start_from.step=8").returncode == 0  # fmt: skip
    assert forked("plan", "lm.yaml", "--from", one).returncode == 0
    told = told_of("--from", "lm", "model.config.num_hidden_layers=3")
    assert "the model section of that run's recipe.yaml" in told

    path, state = project / one, json.loads((project / one / "state.json").read_text())
    index = read_manifest(path)
    digests = [index["files"][f"rank-{rank}.json"] for rank in range(index["ranks"])]
    write_manifest(path, {**state, "slot": None}, digests, index["recipe"])
    lone = project / "lone"
    shutil.copytree(path, lone)
    told = heard("does not tell where its data stood", told_of("--from", "lone", "start_from.what=state"))  # fmt: skip
    assert forked("plan", "lm.yaml", "--from", "lone", "start_from.what=weights").returncode == 0
    assert forked("plan", "lm.yaml", "--from", str(path), "start_from.what=state").returncode == 0
    write_manifest(path, state, digests, None)
    heard("does not hold its recipe. Nearest: a later one", told_of("--from", "lm@4"))
    shutil.rmtree(project / "lm/checkpoints")
    (project / "lm/checkpoints").mkdir()
    heard("has no checkpoint yet", told_of("--from", "lm"))


def test_what_has_happened_to_the_parent_is_noticed(project: Path, forked: Any) -> None:
    """Retrained on other data, damaged, gone, copied out of its run: told, or trained again by `reproduce`."""
    state = ("start_from.what=state", "duration.steps=12")
    (project / "other.txt").write_text("a lazy dog and a slow fox. " * 300)
    for words in (
        ("run", "lm.yaml", "data.path=other.txt", "--run-dir", "p"),
        ("run", "lm.yaml", "data.path=other.txt", "--from", "p", *state, "--run-dir", "c"),
    ):
        done = forked(*words)
        assert done.returncode == 0, done.stderr
    assert "have no line" not in forked("doctor", "c").stdout
    told = heard("the run goes on after step 8 of another one. Nearest: --steps ", forked("reproduce", "c", "--steps", "3").stderr)  # fmt: skip
    assert "--steps 9" in told
    assert (
        json.loads(forked("reproduce", "c", "--steps", "9", "--json").stdout)["verdict"]
        == "identical"
    )

    shutil.copytree(project / "p/checkpoints/step-00000008", project / "kept")
    done = forked(
        "run", "lm.yaml", "data.path=other.txt", "--from", "kept", *state, "--run-dir", "k"
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(project / "k")[-1]["loss"] == steps_of(project / "c")[-1]["loss"]
    assert forked("plan", "k").returncode == 0

    shard = project / "p/checkpoints/step-00000008/rank-0.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(bytes(raw))
    done = forked(
        "run", "lm.yaml", "data.path=other.txt", "--from", "p", *state, "--run-dir", "bad"
    )
    assert done.returncode == 4
    told = heard("start_from: ", done.stderr)
    assert "is not what was saved. Nearest: start_from.step=4" in told
    assert "goes on at step 9" in forked("doctor", "bad").stdout
    done = forked("reproduce", "c", "--json")
    assert json.loads(done.stdout)["verdict"] == "identical"
    assert done.stderr.count("is trained again first") == 1

    shutil.rmtree(project / "p")
    done = forked("run", "lm.yaml", "--run-dir", "p")
    assert done.returncode == 0, done.stderr
    words = ("reproduce", "c", "data.path=other.txt", "--json")
    done = forked(*words)
    assert json.loads(done.stdout)["verdict"] == "identical", done.stderr
    assert done.stderr.count("is trained again first") == 1

    shutil.rmtree(project / "bad/checkpoints")
    (project / "bad/checkpoints").mkdir()
    shutil.rmtree(project / "p")
    done = forked("resume", "bad")
    assert done.returncode == 4
    heard("or another start_from.run", done.stderr)
    heard("it holds no step, so nothing could be compared", forked("reproduce", "bad").stderr)


def test_more_evaluation_data_move_no_sample(project: Path, forked: Any) -> None:
    """The rows that are trained are the same, so the order goes on."""
    (project / "eval.txt").write_text("some words that nobody trains on. " * 40)
    own = ("evaluation.every_steps=2", "data.evaluation={source: files, path: eval.txt}")
    for words in (
        ("run", "lm.yaml", "--run-dir", "p"),
        ("run", "lm.yaml", "duration.steps=12", "--run-dir", "whole"),
        (
            "run",
            "p",
            "--from",
            "p",
            "start_from.what=state",
            "duration.steps=12",
            *own,
            "--run-dir",
            "c",
        ),
    ):
        done = forked(*words)
        assert done.returncode == 0, done.stderr
    ours, whole = steps_of(project / "c"), steps_of(project / "whole")[8:]
    assert [line["digest"] for line in ours] == [line["digest"] for line in whole]
    assert [line["loss"] for line in ours] == [line["loss"] for line in whole]
