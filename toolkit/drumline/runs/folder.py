"""The run folder: its creation, its lock, and the paths in it."""

import contextlib
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drumline.checkpoint.retention import find_checkpoints
from drumline.errors import PlanError, RunError, RunFolderError
from drumline.files import (
    free_name,
    open_regular,
    read_bytes,
    read_json,
    write_json,
    write_text,
)
from drumline.metrics_file import last_step_line
from drumline.output import printable_in
from drumline.plan.model import Plan, StartFacts, read_plan, read_start
from drumline.processes import Process
from drumline.recipe import yaml12
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe
from drumline.runs.schema import why_no_record
from drumline.secrets import Secrets

_LOCK_BYTES = 1 << 12
_LONGEST_NAME = 200
"""Names of files beside the folder are made of its name, and have at most 255 bytes."""
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
        descriptor = open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        with os.fdopen(descriptor, "r+") as file:
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
            with os.fdopen(open_regular(self.path / ".lock")) as file:
                return not _lock(file.fileno(), fcntl.LOCK_SH)
        except OSError:
            return False

    def supervisor(self) -> Process | None:
        """The supervisor's process if it runs on this host, else None."""
        try:
            process = Process.parse(self.lock_text())
        except OSError:
            return None
        return process if process and process.is_alive else None

    def lock_text(self) -> str:
        """What the lock file holds: its last supervisor's process; OSError if it cannot be read."""
        return read_bytes(self.path / ".lock", _LOCK_BYTES).decode(errors="replace")

    def plan_file(self, attempt: int) -> Path:
        """Path of the plan that the workers of an attempt read."""
        return self.path / f"plan-{attempt}.json"

    def logs(self, attempt: int) -> Path:
        """The folder of an attempt's logs and outcome files."""
        return self.path / "logs" / f"attempt-{attempt}"

    def read_record(self) -> dict[str, Any]:
        """Read record.json; RunError if it is not a valid record."""
        try:
            found = read_json(self.record_file)
        except OSError as error:
            raise RunError(f"{self.record_file}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise RunError(f"{self.record_file}: cannot be read: {error}") from None
        if why := why_no_record(found):
            raise RunError(f"{self.record_file}: it is not a record of drumline: {why}")
        return {
            key: value if key in ("code", "recipe") else printable_in(value)
            for key, value in found.items()
        }

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace record.json."""
        why = why_no_record(record)
        assert not why, why
        write_json(self.record_file, record)

    def write_recipe(self, recipe: dict[str, Any], comment: str = "") -> None:
        """Replace recipe.yaml: the resolved recipe, then `comment`, whose lines begin with #."""
        write_text(self.recipe_file, yaml12.dump(recipe) + comment)

    def start_facts(self) -> StartFacts | None:
        """What the run's first plan says of `start_from`; its checkpoint may be gone by now."""
        plain = self.read_record()["plan"].get("start")
        return read_start(plain) if plain else None

    def steps_before(self) -> int:
        """The steps of another run that this one counts on; 0 for a run of its own."""
        start = self.start_facts()
        return start.place.step if start else 0

    def latest_plan(self) -> Plan:
        """The plan of the newest attempt; RunFolderError if the run has no attempt."""
        attempts = len(self.read_record()["attempts"])
        if not attempts:
            raise RunFolderError(
                f"{self.path}: this run never started. Nearest: `drumline run "
                f"{shlex.quote(str(self.recipe_file))}`"
            )
        return self.read_plan(attempts - 1)

    def latest_recipe(self) -> Recipe:
        """The recipe of the newest attempt; that of the record if a kill or a queue has let none begin."""
        record = self.read_record()
        return (
            self.latest_plan().recipe
            if record["attempts"]
            else validate(record["recipe"], str(self.record_file))
        )

    def read_plan(self, attempt: int) -> Plan:
        """The plan of an attempt; RunError if its file is not a plan."""
        path = self.plan_file(attempt)
        try:
            return read_plan(read_bytes(path).decode())
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from None
        except (PlanError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: {error}") from None

    def add_attempt(self, plan: Plan, entry: dict[str, Any], is_restart: bool = False) -> int:
        """Write an attempt's plan and its entry in the record; returns the attempt's number.

        `is_restart`: counts towards max_restarts, as after a failure but not with smaller micro-batches.
        """
        with self.changed_record() as record:
            number = len(record["attempts"])
            self._move_leftovers(number)
            write_text(self.plan_file(number), plan.to_json() + "\n")
            self.logs(number).mkdir(parents=True, exist_ok=True)
            _refuse_links_in(self.logs(number))
            record["attempts"].append({"number": number, **_hidden(entry)})
            record["restarts"] += is_restart
        return number

    def _move_leftovers(self, number: int) -> None:
        """Move aside what lies in an attempt's place though the record, perhaps an older copy, knows none.

        Its outcome files would be taken for the new attempt's.
        """
        for path in (self.logs(number), self.plan_file(number)):
            if os.path.lexists(path):
                path.rename(free_name(path, "before"))

    def steps_reached(self) -> int:
        """The last step that metrics.jsonl or an attempt of the record holds; 0 if the run made none."""
        line = last_step_line(self.metrics_file) or {"step": 0}
        record = self.read_record()
        since = record["begun_anew"][-1]["attempt"] if record.get("begun_anew") else 0
        told = [attempt.get("step") or 0 for attempt in record["attempts"][since:]]
        return max(int(step) for step in (line["step"], *told))

    def begin_anew(self) -> list[Path]:
        """Move checkpoints and metrics aside, to begin at step 1 again; returns what they are called now.

        Deletes nothing. RunFolderError where a checkpoint is still in use: a resume goes on from it.
        """
        left = find_checkpoints(self.checkpoints)
        if left:
            raise RunFolderError(
                f"{self.path}: --from-scratch: it has {left[-1].name}. Nearest: drumline resume without "
                "--from-scratch, which goes on from it, or drumline run for another run"
            )
        moved = [
            path.rename(free_name(path, "before"))
            for path in (self.checkpoints, self.metrics_file)
            if path.exists()
        ]
        self.checkpoints.mkdir()
        with self.changed_record() as record:
            entry = {"attempt": len(record["attempts"]), "kept": [path.name for path in moved]}
            record["begun_anew"] = [*record.get("begun_anew", []), entry]
        return moved

    def forget_restarts(self) -> None:
        """Reset the count of restarts, because a person has resumed the run."""
        self.note(restarts=0)

    def note_attempt(self, number: int, **facts: Any) -> None:
        """Add facts to an attempt's entry; its outcome becomes the run's."""
        with self.changed_record() as record:
            record["attempts"][number].update(_hidden(facts))
            record["outcome"] = facts.get("outcome")

    def note(self, **facts: Any) -> None:
        """Add facts to the top level of the record."""
        with self.changed_record() as record:
            record.update(_hidden(facts))

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
        descriptor = open_regular(self.path / ".record.lock", os.O_WRONLY | os.O_CREAT)
        with os.fdopen(descriptor, "w") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            record = self.read_record()
            yield record
            self.write_record(record)


def _hidden(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without secrets of this process's environment, which messages and commands may repeat."""
    return Secrets(os.environ).hide_in(facts)  # type: ignore[no-any-return]


def _lock(descriptor: int, kind: int) -> bool:
    """Try to take a lock without waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_new(run_dir: Path) -> None:
    """Raise RunFolderError unless the folder is new or empty, and its name can be written into records."""
    try:
        str(run_dir.absolute()).encode()
    except UnicodeEncodeError:
        raise RunFolderError(
            f"--run-dir {run_dir}: its name is not UTF-8. Nearest: another --run-dir"
        ) from None
    if len(os.fsencode(run_dir.name)) > _LONGEST_NAME:
        raise RunFolderError(
            f"--run-dir {run_dir.name[:40]}…: its name has {len(os.fsencode(run_dir.name))} bytes, more than "
            f"{_LONGEST_NAME}. Nearest: a shorter one"
        )
    for parent in run_dir.parents:
        if parent.exists() and not parent.is_dir():
            raise RunFolderError(f"--run-dir {run_dir}: {parent} is a file, not a folder")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        holds_run = (run_dir / "record.json").is_file()
        what = "holds a run" if holds_run else "is not an empty folder"
        resume = f"`drumline resume {shlex.quote(str(run_dir))}` to go on, or " if holds_run else ""
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
        folder = RunFolder(path.resolve())
        refuse_links(folder)
        return folder
    if not path.exists():
        what = "does not exist"
    elif (path / "manifest.json").is_file() and (path.parent.parent / "record.json").is_file():
        what = f"is a checkpoint. Nearest: {path.parent.parent}"
    else:
        what = "is not a run folder (no record.json)"
    raise RunFolderError(f"{path}: {what}")


def refuse_links(folder: RunFolder) -> None:
    """Raise RunFolderError if a file or folder of the run is a symbolic link.

    What drumline writes, renames and deletes in a run folder must be that run's own; it makes no links there.
    """
    for parent in (folder.path, folder.checkpoints, folder.path / "logs"):
        _refuse_links_in(parent)


def _refuse_links_in(parent: Path) -> None:
    try:
        with os.scandir(parent) as entries:
            links = sorted(entry.path for entry in entries if entry.is_symlink())
    except OSError:  # missing, or not readable: what opens its files says so
        return
    if links:
        raise RunFolderError(
            f"{links[0]}: is a symbolic link, and what it leads to may be another run's. Nearest: put the "
            "file or folder itself in its place"
        )
