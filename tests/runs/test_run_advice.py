"""What a run folder is refused for with a "Nearest" is done when that is followed."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands_here import NOBODY

from advice import (
    LM,
    Row,
    command_in,
    heard,
    here,
    programs,
    refused,
    worked,
)
from conftest import tiny_recipe
from drumline.checkpoint.retention import find_checkpoints, newest_sound
from drumline.errors import CheckpointUnreadable, DrumlineError, RunError
from drumline.recipe.load import validate
from drumline.runs.code import read_code, restore_code
from drumline.runs.folder import RunFolder, check_new
from drumline.secrets import Secrets

__all__ = ["here", "programs"]

SHORT = ["duration.steps=2", "schedule.warmup_steps=0"]


def test_a_run_with_everything_wrong_goes_on_when_each_advice_is_followed(
    here: Path, forked: Any
) -> None:
    """Each message is followed, which leads to the next one, and at last the run is trained to its end."""
    run, aside = here / "stopped-lm", here / "aside"
    aside.mkdir()

    def resumed(*options: str) -> str:
        done = forked("resume", str(run), *options)
        assert done.returncode in (2, 4), done.stderr
        return str(done.stderr)

    (run / "recipe.yaml").rename(aside / "recipe.yaml")
    (run / "recipe.yaml").symlink_to(aside / "recipe.yaml")
    heard("put the file or folder itself in its place", resumed())
    (aside / "recipe.yaml").replace(run / "recipe.yaml")
    (run / "checkpoints").rename(aside / "checkpoints")
    with RunFolder(run).locked():
        heard("another process is running it. Nearest: stop that one first", resumed())
    heard("it is gone. Nearest: put it back", resumed())
    (run / "checkpoints").mkdir()
    heard("Nearest: put that checkpoint back", resumed())
    (sound,) = find_checkpoints(aside / "checkpoints")
    shutil.copytree(sound, run / "checkpoints" / sound.name)
    (run / "checkpoints" / sound.name / "state.json").write_text("{")
    heard("Nearest: put a sound copy in their place", resumed())
    shutil.copytree(sound, run / "checkpoints" / sound.name)
    (run / "metrics.jsonl").rename(aside / "metrics.jsonl")
    (run / "metrics.jsonl").mkdir()
    heard("is not a regular file. Nearest: move it away", resumed())
    (run / "metrics.jsonl").rmdir()
    (aside / "metrics.jsonl").rename(run / "metrics.jsonl")
    heard("--from-scratch: it has step-", resumed("--from-scratch"))
    refusal = refused("run", "project/lm.yaml", "--run-dir", str(run))
    heard("holds a run. Nearest: `drumline resume", refusal)
    done = forked(*command_in(refusal))
    assert done.returncode == 0, done.stderr
    assert "step 60/60" in worked("status", str(run)).out


def test_steps_without_a_checkpoint_are_trained_again(here: Path, forked: Any) -> None:
    """Another run of the same recipe; the command that is named is quoted where the folder's name has a space."""
    run = here / "stopped-lm"
    for path in find_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    (run / "metrics.jsonl").unlink()
    refusal = forked("resume", str(run))
    heard("and saved no checkpoint. Nearest: another run", refusal.stderr)
    done = forked("run", str(run), *SHORT, "--run-dir", "another")
    assert done.returncode == 0, done.stderr
    assert command_in(refusal.stderr) == ["resume", "--from-scratch", str(run)]
    # which test_survival.py::test_out_of_memory_at_per_device_1_fails_with_advice follows


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Files are opened as a user who owns nothing."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_what_cannot_be_read_is_made_readable(here: Path) -> None:
    """A file of a checkpoint, and the folder of checkpoints, closed to this user: opened, they are read."""
    folder = here / LM / "checkpoints"
    for path in [*folder.rglob("*"), folder, *folder.parents]:
        if path != Path("/tmp") and path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | (0o011 if path.is_dir() else 0o044))
    for path in (folder, *folder.glob("step-*")):
        path.chmod(0o755)
    (file,) = folder.glob("step-*/state.json")
    said: list[str] = []
    for path, mode in ((file, 0o644), (folder, 0o755)):
        path.chmod(0o600)
        with another_user(), pytest.raises(CheckpointUnreadable) as caught:
            newest_sound(folder, said.append)
        assert "Nearest: make it readable for this user" in str(caught.value)
        said.append(str(caught.value))
        path.chmod(mode)
        with another_user():
            assert newest_sound(folder, said.append)
    first, second = said
    heard("That does not say that it is damaged", first)
    heard("cannot be listed", second)


@pytest.mark.parametrize("row", [
    Row("Nearest: a shorter one", "a" * 201, ["a" * 200]),
    Row("its name is not UTF-8. Nearest: another --run-dir", os.fsdecode(b"\xff"), ["a"]),
    Row("is not an empty folder. Nearest: another --run-dir", "project", ["another"]),
], ids=lambda row: row.words)  # fmt: skip
def test_another_run_dir_is_taken(here: Path, row: Row) -> None:
    """Where a name is too long, not UTF-8, or taken."""
    with pytest.raises(DrumlineError) as caught:
        check_new(here / row.wrong)
    heard(row.words, str(caught.value))
    for way in row.ways:
        check_new(here / way)


def test_where_runs_are_is_found(here: Path) -> None:
    """A checkpoint's run, and another folder than one that is none."""
    (checkpoint,) = find_checkpoints(here / LM / "checkpoints")
    told = heard("is a checkpoint. Nearest: ", refused("status", str(checkpoint)))
    worked("status", told.strip().partition("Nearest: ")[2])
    heard("is not a folder. Nearest: drumline run, or another folder", refused("runs"))
    assert LM in worked("runs", ".").out


def git(folder: Path, *words: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *name, *words], check=True, capture_output=True)


def repository(folder: Path) -> Path:
    """A repository with one commit of a project's code."""
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "m.py").write_text("def make():\n    return 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def code_of(folder: Path) -> dict[str, Any]:
    recipe = validate(tiny_recipe(project=str(folder), model={"factory": "m:make"}), "r")
    return read_code(recipe, folder, Secrets({}))


def test_git_s_odd_name_is_removed(tmp_path: Path) -> None:
    """A setting whose name could be taken for another one: without it, code is recorded and restored."""
    source = repository(tmp_path / "code")
    config = (source / ".git/config").read_text()
    (source / ".git/config").write_text(config + '[filter "a=b"]\n\tclean = cat\n')
    with pytest.raises(RunError) as caught:
        code_of(source)
    heard("git's configuration has an odd name", str(caught.value))
    git(source, "config", "--remove-section", "filter.a=b")
    assert code_of(source)["commit"]


def fetched(clone: Path, source: Path) -> Path:
    git(clone, "fetch", "-q")
    return clone


def the_other(clone: Path, source: Path) -> Path:
    return source


@pytest.mark.parametrize("way", [fetched, the_other])
def test_a_commit_that_is_not_here_is_fetched(
    tmp_path: Path, way: Callable[[Path, Path], Path]
) -> None:
    """`git fetch`, or the command inside another clone: the code is restored."""
    source = repository(tmp_path / "code")
    git(tmp_path, "clone", "-q", str(source), "clone")
    (source / "m.py").write_text("def make():\n    return 2\n")
    git(source, "commit", "-qam", "second")
    code = code_of(source)
    with pytest.raises(RunError) as caught:
        restore_code(code, tmp_path / "clone", tmp_path / "restored")
    heard("or run this inside a clone of that repository", str(caught.value))
    place = way(tmp_path / "clone", source)
    restored = restore_code(code, place, tmp_path / "restored")
    assert "return 2" in (restored / "m.py").read_text()
