"""Trackers beside a run: the real W&B client and TensorBoard's writer, read back, cut short, hung, failing."""

import contextlib
import json
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from logged_runs import make_run, step_line, write_lines

from advice import heard
from drumline.compare import wandb_runs
from drumline.compare.sources import read_logged
from drumline.errors import RunFolderError
from drumline.recipe.load import validate
from drumline.runs import trackers
from drumline.runs.folder import RunFolder
from drumline.runs.trackers import Trackers

pytestmark = [pytest.mark.xdist_group("trackers")]


def track(folder: RunFolder) -> list[str]:
    """Start the trackers, let them finish; the warnings."""
    told: list[str] = []
    recipe = validate(folder.read_record()["recipe"], "r")
    with Trackers(folder, recipe, told.append):
        pass
    return told


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Twelve steps and an evaluation, sent by both trackers; then a resume with eight more."""
    lines = [*(step_line(n) for n in range(1, 13)), {"step": 12, "eval/loss": 0.5}]
    path = tmp_path_factory.mktemp("tracked") / "r"
    folder = make_run(path, lines, wandb={"project": "p"}, tensorboard=True)
    assert track(folder) == []
    folder.note(
        outcome="finished",
        weights={"step": 20, "sha256": "s", "elements": 1, "norm": 1.0, "sketch": [0.1] * 64},
    )
    again = [step_line(12, loss=9.5), *(step_line(n) for n in range(13, 21))]
    write_lines(
        folder, [*lines[:11], *again]
    )  # what a resume from step 11 leaves, step 12 having come out otherwise
    assert track(folder) == []
    return folder


def test_wandb_holds_the_run_and_a_resume_goes_on_in_it(tracked: RunFolder) -> None:
    """One id over both starts; each step as in metrics.jsonl to the last digit; recipe, plan and record."""
    entry = tracked.read_record()["trackers"]["wandb"]
    files = sorted(tracked.path.rglob("*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{entry['id']}.wandb"}
    logged = read_logged(str(tracked.path / "wandb"))
    kept = [json.loads(line) for line in tracked.metrics_file.read_text().splitlines()]
    for ours, line in zip(logged.steps, kept, strict=True):
        known = {name: value for name, value in line.items() if value is not None}
        assert ours == {"kind": "step", **known}
    assert logged.evaluations == [{"kind": "evaluation", "step": 12, "eval/loss": 0.5}]
    record = tracked.read_record()
    assert logged.recipe == record["recipe"]
    for name in ("plan", "code", "versions", "data", "weights", "recipe_sha256"):
        assert logged.record[name] == record[name]


def test_a_resume_sends_no_step_twice(tracked: RunFolder) -> None:
    """Only what is new, or came out otherwise."""
    history: list[dict[str, Any]] = []
    for file in sorted(tracked.path.rglob("*.wandb")):
        wandb_runs._read_file(file, {}, {}, history)
    sent = [row["step"] for row in history if "lr" in row]
    assert sorted(sent) == sorted([*range(1, 21), 12])


def test_the_record_is_an_artifact(tracked: RunFolder) -> None:
    """record.json and recipe.yaml, as W&B will upload them."""
    from wandb.proto import wandb_internal_pb2

    names: set[str] = set()
    for file in tracked.path.rglob("*.wandb"):
        for data in wandb_runs._records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            manifest = (
                record.request.log_artifact.artifact.manifest
                if record.HasField("request")
                else record.artifact.manifest
            )
            names |= {entry.path for entry in manifest.contents}
    assert {"record.json", "recipe.yaml"} <= names


def test_tensorboard_holds_every_number(tracked: RunFolder) -> None:
    """Read back by TensorBoard's own reader: float32 of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tracked.path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = {
        event.step: float(make_ndarray(event.tensor_proto))
        for event in events.Tensors("train/loss")
    }
    kept = [json.loads(line) for line in tracked.metrics_file.read_text().splitlines()]
    want = {line["step"]: struct.unpack("f", struct.pack("f", line["loss"]))[0] for line in kept}
    assert found == want
    assert [event.step for event in events.Tensors("eval/loss")] == [12]


def test_a_file_that_was_cut_anywhere_is_read_to_its_last_sound_record(
    tracked: RunFolder, tmp_path: Path
) -> None:
    """More bytes, never fewer steps; each step that is read is right; a flipped bit ends the reading."""
    (tmp_path / "one").mkdir()
    file = shutil.copy(
        max(tracked.path.rglob("*.wandb"), key=lambda p: p.stat().st_size), tmp_path / "one"
    )
    raw, before, whole = Path(file).read_bytes(), 0, read_logged(file).steps
    assert len(whole) >= 9
    for size in sorted({*range(len(raw) - 400, len(raw), 37), *range(7, len(raw), 211)}):
        Path(file).write_bytes(raw[:size])
        steps = []
        with contextlib.suppress(RunFolderError):  # cut before the config
            steps = read_logged(file).steps
        assert steps == whole[: len(steps)]
        assert len(steps) >= before
        before = len(steps)
    assert before >= len(whole) - 1
    at = raw.index(b"grad_norm", len(raw) // 2)
    Path(file).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert read_logged(file).steps == whole[: len(read_logged(file).steps)] != whole


def test_several_runs_in_one_folder_are_told(tracked: RunFolder, tmp_path: Path) -> None:
    """Which of them is meant is not guessed; each of them can be named."""
    for name in ("run-a.wandb", "run-b.wandb"):
        shutil.copy(next(tracked.path.rglob("*.wandb")), tmp_path / name)
    with pytest.raises(
        RunFolderError, match=r"it holds several runs: run-a\.wandb, run-b\.wandb"
    ) as caught:
        read_logged(str(tmp_path))
    heard("Nearest: one of these files", str(caught.value))
    for name in ("run-a.wandb", "run-b.wandb"):
        assert read_logged(str(tmp_path / name)).steps


def test_what_is_no_wandb_file_is_told(tmp_path: Path) -> None:
    """By its first bytes."""
    (tmp_path / "run-x.wandb").write_text("hello")
    with pytest.raises(RunFolderError, match=r"it is not a \.wandb file"):
        read_logged(str(tmp_path / "run-x.wandb"))


@pytest.fixture
def unanswered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A run tracked online by the real client, at a loopback server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield make_run(tmp_path / "r", [step_line(1)], wandb={"project": "p", "mode": "online"})


def test_a_tracker_that_hangs_is_dropped_with_one_warning(
    unanswered: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client before a server that never answers: `look` costs nothing, the end comes in time."""
    monkeypatch.setattr(trackers, "LEAVE_S", 3.0)
    told: list[str] = []
    with Trackers(
        unanswered, validate(unanswered.read_record()["recipe"], "r"), told.append
    ) as beside:
        time.sleep(2.0)
        process = beside._running["wandb"][0]
        beside.look()
        assert told == []
    assert len(told) == 1
    assert told[0].startswith("wandb is dropped: it did not send the rest within 3 s")
    assert process.poll() is not None


def test_a_tracker_that_does_not_move_is_dropped_while_the_run_goes_on(
    unanswered: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its beat, once."""
    monkeypatch.setattr(trackers, "HANG_S", 1.0)
    told: list[str] = []
    with Trackers(
        unanswered, validate(unanswered.read_record()["recipe"], "r"), told.append
    ) as beside:
        deadline = time.monotonic() + 30
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            beside.look()
        beside.look()
    assert told == [told[0]]
    assert "it has not moved for 1 s" in told[0]


def test_a_tracker_that_fails_is_dropped_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online without a login: the client's own words, and the other tracker goes on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    lines = [step_line(1), step_line(2)]
    folder = make_run(
        tmp_path / "r", lines, wandb={"project": "p", "mode": "online"}, tensorboard=True
    )
    told: list[str] = []
    with Trackers(folder, validate(folder.read_record()["recipe"], "r"), told.append) as beside:
        deadline = time.monotonic() + 60
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            beside.look()
    assert len(told) == 1
    assert told[0].startswith("wandb is dropped: ")
    assert "API key" in told[0] or "api_key" in told[0] or "login" in told[0]
    assert list((tmp_path / "r/tensorboard").glob("events.*"))


def test_a_run_is_read_through_the_api(tracked: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb:E/P/ID` gives what the offline file gives.

    No W&B server can be had here, so wandb.Api is stood in for, with the shapes of its answers.
    """
    import wandb

    offline = read_logged(str(tracked.path / "wandb"))
    rest = {k: v for k, v in offline.record.items() if k not in ("recipe", "plan", "weights")}

    class Run:
        def __init__(self) -> None:
            self.config = {"recipe": offline.recipe, "plan": offline.record["plan"], "record": rest}
            self.summary = {"weights": offline.record["weights"], "outcome": "finished"}

        def scan_history(self) -> Iterator[dict[str, Any]]:
            for n, line in enumerate(offline.steps):
                yield {**line, "_step": n, "_timestamp": 1.0}

    class Api:
        def run(self, name: str) -> Run:
            if name != "e/p/1":
                raise wandb.errors.CommError(f"Could not find run {name}")
            return Run()

    monkeypatch.setattr(wandb, "Api", Api)
    found = read_logged("wandb:e/p/1")
    assert found.steps == offline.steps
    assert found.record == offline.record
    with pytest.raises(RunFolderError, match="Could not find run e/p/2"):
        read_logged("wandb:e/p/2")
    with pytest.raises(RunFolderError, match="expected wandb:ENTITY/PROJECT/ID"):
        read_logged("wandb:e/p")
