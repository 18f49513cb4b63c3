"""The run folder: its creation, its lock, and the paths in it."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.errors import RunError, RunFolderError
from drumline.files import write_json, write_text
from drumline.plan.model import Plan, read_plan
from drumline.processes import Process
from drumline.recipe import yaml12
from drumline.recipe.schema import Recipe

_LOCK_S = 0.5
"""How long to retry, because `drumline doctor` holds the lock briefly to test it."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file = path / "record.json"
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for one supervisor; RunFolderError if another one holds the lock."""
        with (self.path / ".lock").open("a+") as file:
            deadline = time.monotonic() + _LOCK_S
            while not _lock(file.fileno(), fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise RunFolderError(
                        f"{self.path}: another process is running it. Nearest: stop that one first"
                    )
                time.sleep(0.05)
            file.truncate(0)
            file.write(str(Process.current()))
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether a supervisor holds the lock now."""
        try:
            with (self.path / ".lock").open() as file:
                return not _lock(file.fileno(), fcntl.LOCK_SH)
        except OSError:
            return False

    def supervisor(self) -> Process | None:
        """The supervisor's process if it runs on this host, else None."""
        try:
            process = Process.parse((self.path / ".lock").read_text())
        except OSError:
            return None
        return process if process and process.is_alive else None

    def plan_file(self, attempt: int) -> Path:
        """Path of the plan that the workers of an attempt read."""
        return self.path / f"plan-{attempt}.json"

    def logs(self, attempt: int) -> Path:
        """The folder of an attempt's logs and outcome files."""
        return self.path / "logs" / f"attempt-{attempt}"

    def read_record(self) -> dict[str, Any]:
        """Read record.json; RunError if it is not a valid record."""
        try:
            found = json.loads(self.record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.record_file}: cannot be read: {error}") from None
        needed = {"attempts", "outcome", "restarts", "training_sha256", "data"}
        if not isinstance(found, dict) or not needed <= set(found):
            raise RunError(f"{self.record_file}: it is not a record of drumline")
        if not isinstance(found["attempts"], list):
            raise RunError(f"{self.record_file}: its attempts are no list")
        return found

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace record.json."""
        write_json(self.record_file, record)

    def write_recipe(self, recipe: dict[str, Any], comment: str = "") -> None:
        """Replace recipe.yaml: the resolved recipe, then `comment`, whose lines begin with #."""
        write_text(self.recipe_file, yaml12.dump(recipe) + comment)

    def latest_plan(self) -> Plan:
        """The plan of the newest attempt; RunFolderError if the run has no attempt."""
        attempts = len(self.read_record()["attempts"])
        if not attempts:
            raise RunFolderError(
                f"{self.path}: this run never started. Nearest: `drumline run {self.recipe_file}`"
            )
        return read_plan(self.plan_file(attempts - 1).read_text(encoding="utf-8"))

    def add_attempt(self, plan: Plan, entry: dict[str, Any], is_restart: bool = False) -> int:
        """Write an attempt's plan and its entry in the record; returns the attempt's number.

        `is_restart`: counts towards max_restarts, as after a failure but not with smaller micro-batches.
        """
        with self.changed_record() as record:
            number = len(record["attempts"])
            write_text(self.plan_file(number), plan.to_json() + "\n")
            self.logs(number).mkdir(parents=True, exist_ok=True)
            record["attempts"].append({"number": number, **entry})
            record["restarts"] += is_restart
        return number

    def forget_restarts(self) -> None:
        """Reset the count of restarts, because a person has resumed the run."""
        self.note(restarts=0)

    def note_attempt(self, number: int, **facts: Any) -> None:
        """Add facts to an attempt's entry; its outcome becomes the run's."""
        with self.changed_record() as record:
            record["attempts"][number].update(facts)
            record["outcome"] = facts.get("outcome")

    def note(self, **facts: Any) -> None:
        """Add facts to the top level of the record."""
        with self.changed_record() as record:
            record.update(facts)

    def add_job(self, entry: dict[str, Any]) -> None:
        """Add a submitted job, which may already run and write to the record itself."""
        with self.changed_record() as record:
            record["jobs"] = [*record.get("jobs", []), entry]

    @contextlib.contextmanager
    def changed_record(self) -> Iterator[dict[str, Any]]:
        """Yield the record for changes, and write it if the block ends without an error.

        A lock is held from read to write, so that two processes cannot overwrite each other's changes. It is
        a separate file, because record.json itself is replaced.
        """
        with (self.path / ".record.lock").open("a") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            record = self.read_record()
            yield record
            self.write_record(record)


def _lock(descriptor: int, kind: int) -> bool:
    """Try to take a lock without waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_new(run_dir: Path) -> None:
    """Raise RunFolderError unless the folder is new or empty."""
    for parent in run_dir.parents:
        if parent.exists() and not parent.is_dir():
            raise RunFolderError(f"--run-dir {run_dir}: {parent} is a file, not a folder")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        holds_run = (run_dir / "record.json").is_file()
        what = "holds a run" if holds_run else "is not an empty folder"
        resume = f"`drumline resume {run_dir}` to go on, or " if holds_run else ""
        raise RunFolderError(f"--run-dir {run_dir}: {what}. Nearest: {resume}another --run-dir")


def create(recipe: Recipe, run_dir: Path | None, runs: Path | None = None) -> RunFolder:
    """Create a run folder: `<recipe>-<n>` in `runs`, or run_dir, which must be new or empty."""
    if run_dir is not None:
        check_new(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir.resolve()
    else:
        path = _next_numbered(runs or Path.cwd() / "runs", recipe.recipe)
    folder = RunFolder(path)
    folder.checkpoints.mkdir()
    folder.write_recipe(recipe.model_dump(by_alias=True))
    return folder


def _next_numbered(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [p.name.removeprefix(f"{name}-") for p in parent.glob(f"{name}-*")]
    number = max((int(t) for t in taken if t.isdigit()), default=0) + 1
    while True:
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def open_run(path: Path) -> RunFolder:
    """Open an existing run folder; else RunFolderError says what the path is."""
    if (path / "record.json").is_file():
        return RunFolder(path.resolve())
    if not path.exists():
        what = "does not exist"
    elif (path / "manifest.json").is_file() and (path.parent.parent / "record.json").is_file():
        what = f"is a checkpoint. Nearest: {path.parent.parent}"
    else:
        what = "is not a run folder (no record.json)"
    raise RunFolderError(f"{path}: {what}")
