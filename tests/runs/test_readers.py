"""A command that only reads changes nothing, whatever a run folder holds and whoever it belongs to."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands_here import NOBODY, call, snapshot

from conftest import ROOT

RUNS = ROOT / "tests/fixtures/format_2"
READERS = {
    "doctor": ("doctor", "r"),
    "status": ("status", "r"),
    "logs": ("logs", "r"),
    "runs": ("runs", "."),
    "plan": ("plan", "r"),
    "compare": ("compare", "r", "r"),
    "report": ("report", "r", "--output", "../page.html"),
    "export": ("export", "r", "../exported"),
    "cancel": ("cancel", "r"),
    "run": ("run", "r", "--dry-run"),
    "calibrate": ("calibrate", "r"),
}
FILES = [
    "record.json",
    "recipe.yaml",
    "metrics.jsonl",
    "plan-0.json",
    "checkpoints",
    "checkpoints/step-00000012",
    "checkpoints/step-00000012/manifest.json",
    "checkpoints/step-00000012/state.json",
    "checkpoints/step-00000012/rank-0.json",
    "checkpoints/step-00000012/rank-1.safetensors",
    "logs",
]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a finished run `r`, readable by everybody."""
    folder = tmp_path / "desk"
    shutil.copytree(RUNS / "finished-lm", folder / "r")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("command", READERS)
def test_on_another_users_run_with_each_file_unreadable(desk: Path, command: str) -> None:
    """Each file in turn with mode 0, the command as another user: nothing changes, no traceback."""
    for name in FILES:
        path = desk / "r" / name
        mode = path.stat().st_mode
        path.chmod(0)
        before = snapshot(desk)
        done = call(desk, *READERS[command], user=NOBODY)
        assert snapshot(desk) == before, (name, done.err)
        assert "Traceback" not in done.err, (name, done.err)
        assert done.code in (0, 2, 4, 5), (name, done)
        path.chmod(mode)
        shutil.rmtree(desk.parent / "exported", ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_unreadable_shard_stops_a_resume_and_is_told_by_doctor(desk: Path) -> None:
    """`export` and `doctor` call it unreadable, not damaged, and say what to do; readable again, it is used."""
    shard = desk / "r/checkpoints/step-00000012/rank-1.safetensors"
    shard.chmod(0)
    exported = call(desk, "export", "r", "../exported", user=NOBODY)
    assert exported.code == 4
    assert "rank-1.safetensors: cannot be read: Permission denied" in exported.err
    assert "That does not say that it is damaged" in exported.err
    health = json.loads(call(desk, "doctor", "r", "--json", user=NOBODY).out)
    assert health["bad"] == {}
    assert health["next"].startswith("make step-00000012 readable")
    shard.chmod(0o644)
    health = json.loads(call(desk, "doctor", "r", "--json", user=NOBODY).out)
    assert "step-00000012" in health["sound"]


def put_link(path: Path, target: Path) -> None:
    """Replace a file or folder by a link."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", [".lock", ".record.lock", "checkpoints", "metrics.jsonl", "logs",
                                  "plan-0.json", "plan-1.json", "record.json", "logs/attempt-0", "wandb",
                                  "checkpoints/step-00000012"])  # fmt: skip
@pytest.mark.parametrize("command", ["resume", "doctor", "export", "status"])
def test_links_in_a_run_folder_are_refused_by_name(desk: Path, name: str, command: str) -> None:
    """Each file or folder in turn a link to another run's, or dangling: named, and nothing of the other changes."""
    shutil.copytree(RUNS / "stopped-lm", desk / "other")
    other = desk / "other" / name
    put_link(desk / "r" / name, other if other.exists() else desk / "other/dangling")
    before = snapshot(desk)
    words = READERS.get(command, (command, "r"))
    done = call(desk, *words)
    assert done.code == 2, done.err
    assert f"r/{name}: is a symbolic link" in done.err
    assert snapshot(desk) == before


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def sparse(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(40 << 30)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


BOMBS: dict[str, Callable[[Path], object]] = {
    "pipe": pipe,
    "sparse": sparse,
    "deep": lambda path: path.write_text(deep(200_000)),
    "deep in a record": lambda path: path.write_text('{"attempts": ' + deep(5_000) + "}"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "empty": lambda path: path.write_text(""),
    "null": lambda path: path.write_text("null"),
    "NaN": lambda path: path.write_text("NaN"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "name", ["record.json", "metrics.jsonl", ".lock", "plan-0.json", "recipe.yaml"]
)
def test_what_is_no_record_is_told_in_a_second(desk: Path, name: str, bomb: str) -> None:
    """Every reader ends at once, without a traceback, and nothing changes."""
    BOMBS[bomb](desk / "r" / name)
    before = snapshot(desk)
    for command in ("status", "doctor", "runs", "resume", "plan", "compare"):
        started = time.monotonic()
        done = call(desk, *READERS.get(command, (command, "r")), limit_s=20)
        assert done.code in (0, 2, 4), (command, done)
        assert "Traceback" not in done.err, done.err
        assert time.monotonic() - started < 15, command  # a second alone; these machines are shared
    assert snapshot(desk) == before
