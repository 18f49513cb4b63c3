"""record.json under several writers: nobody's change is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SOURCES, tiny_recipe
from drumline.errors import RunError
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate
from drumline.runs.folder import RunFolder
from drumline.runs.record import attempt_entry

PLAN = {
    "steps": {"total": 1},
    "batch": {"effective": 1, "per_device": 1, "gpus": 1, "accumulation": 1},
}
WRITER = """
import sys
from pathlib import Path
from drumline.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
for number in range(30):
    folder.add_job({"target": "slurm", "id": f"{ord(sys.argv[2])}{number:02d}"})
"""


def a_run(path: Path) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir()
    record = {"recipe": {"recipe": "r"}, "plan": PLAN, "attempts": [], "outcome": None, "restarts": 0,
              "training_sha256": "", "data": {"fingerprint": None}}  # fmt: skip
    folder.write_record({**record, "jobs": []})
    return folder


def test_submit_and_its_job_write_at_once(tmp_path: Path) -> None:
    """Three processes add jobs while this one adds attempts, as submit and a job that has just started do."""
    folder = a_run(tmp_path / "r")
    plan = resolve(validate(tiny_recipe(), "r"))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder.path), name], env={"PYTHONPATH": SOURCES}
        )
        for name in "abc"
    ]
    numbers = []
    while any(writer.poll() is None for writer in writers) or len(numbers) < 20:
        number = folder.add_attempt(plan, attempt_entry(plan, "start"))
        folder.note_attempt(number, outcome="stopped")
        numbers.append(number)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    record = folder.read_record()
    assert len(record["jobs"]) == 90
    assert [attempt["number"] for attempt in record["attempts"]] == numbers
    assert all(attempt["outcome"] == "stopped" for attempt in record["attempts"])


def test_an_error_in_a_change_changes_nothing(tmp_path: Path) -> None:
    """What was read is not written when the change fails."""
    folder = a_run(tmp_path / "r")
    before = folder.record_file.read_text()

    def change() -> None:
        with folder.changed_record() as record:
            record["outcome"] = "finished"
            raise RunError("no")

    with pytest.raises(RunError):
        change()
    assert folder.record_file.read_text() == before
