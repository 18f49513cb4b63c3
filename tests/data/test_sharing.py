"""Prepared rows, checkpoints and exports are files like others: of the umask, cleaned up, and told whose they are."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands_here import NOBODY, call
from savers import save
from test_readers import RUNS, desk

from advice import heard
from conftest import tiny_recipe
from drumline.data import cache
from drumline.data.prepare import prepare
from drumline.files import new_folder
from drumline.recipe import yaml12
from drumline.recipe.load import validate

__all__ = ["desk"]

RECIPE = {"data": {"options": {"rows": 500}, "samples": None, "validation": 0.0}}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that everybody can reach."""
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    folder = tmp_path / "cache"
    monkeypatch.setenv("DRUMLINE_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700)])
def test_the_umask_rules(shared: Path, tmp_path: Path, umask: int, mode: int) -> None:
    """Folders and files of prepared rows and of checkpoints have the modes that any program's have."""
    before = os.umask(umask)
    try:
        prepared = prepare(validate(tiny_recipe(**RECIPE), "r").data, None)
        saved = save(tmp_path / "c", 1)
    finally:
        os.umask(before)
    for folder in (prepared, saved):
        for path in [folder, *folder.rglob("*")]:
            expected = mode if path.is_dir() else mode & 0o666
            assert path.stat().st_mode & 0o777 == expected, path


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_rows_of_another_user_are_used_or_told_whose_they_are(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared under umask 022: the second user plans with them. Closed to him: owner, mode and two ways out are named."""
    desk = tmp_path / "desk"
    desk.mkdir(mode=0o777)
    desk.chmod(0o777)
    (desk / "r.yaml").write_text(yaml12.dump(tiny_recipe(**RECIPE)))
    prepared = prepare(validate(tiny_recipe(**RECIPE), "r").data, str(tmp_path))
    planned = call(desk, "plan", "r.yaml", user=NOBODY)
    assert "500 samples" in planned.out, planned
    prepared.chmod(0o700)
    for command in ("plan", "prepare"):
        told = call(desk, command, "r.yaml", user=NOBODY)
        text = " ".join((told.out + told.err).split())
        assert "prepared by root with mode 0700" in text, told
        assert "chmod -R a+rX" in text
        assert "Traceback" not in told.err
    command = heard("which this user cannot use", told.err).partition("root runs ")[2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o777)
    elsewhere.chmod(0o777)
    monkeypatch.setenv("DRUMLINE_CACHE", str(elsewhere))
    assert call(desk, "prepare", "r.yaml", user=NOBODY).code == 0
    monkeypatch.setenv("DRUMLINE_CACHE", str(shared))
    subprocess.run(shlex.split(command.partition(", or")[0]), check=True)
    planned = call(desk, "plan", "r.yaml", user=NOBODY)
    assert "500 samples" in planned.out, planned


def test_what_a_killed_prepare_leaves_is_deleted_by_the_next(shared: Path, tmp_path: Path) -> None:
    """SIGKILL while rows are written: the next prepare, of any data, removes the hidden folder."""
    pid = os.fork()
    if pid == 0:
        prepare(
            validate(tiny_recipe(**RECIPE), "r").data,
            None,
            lambda documents, rows, share: time.sleep(60),
        )
        os._exit(0)
    deadline = time.monotonic() + 30
    while not list(shared.glob("data/.*/.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = shared.glob("data/.*")
    os.utime(left, (time.time() - 10, time.time() - 10))
    other = {"data": {**RECIPE["data"], "options": {"rows": 300}}}
    prepared = prepare(validate(tiny_recipe(**other), "r").data, None)
    assert list((shared / "data").iterdir()) == [prepared]


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """An error, also a library's words for a full disk, leaves nothing; what a killed process left is replaced."""
    target = tmp_path / "model"

    def fail() -> None:
        with new_folder(target) as written:
            (written / "half").touch()
            raise RuntimeError("serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device; nothing was written"):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part/half").touch()
    with new_folder(target) as written:
        (written / "whole").touch()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_an_export_on_a_full_disk_is_one_message_and_leaves_nothing(desk: Path) -> None:
    """A tmpfs of 32 KiB: the disk is named, and no half folder stays."""
    run = desk / "r"
    for path in run.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            path.write_text(path.read_text().replace("@FOLDER@", str(RUNS)))
    prepared = call(desk, "prepare", "r")
    assert prepared.code == 0, prepared
    small = desk / "small"
    small.mkdir()
    os.system(f"mount -t tmpfs -o size=32k none {small}")
    try:
        done = call(desk, "export", "r", "small/model")
        assert done.code == 2, done
        assert "small/model: No space left on device; nothing was written" in done.err
        assert not list(small.iterdir())
    finally:
        os.system(f"umount {small}")
    exported = call(desk, "export", "r", "model")
    assert exported.code == 0, exported
    assert (desk / "model/model.safetensors").stat().st_mode & 0o044


def test_a_changed_helper_of_a_data_factory_is_a_new_key(tmp_path: Path) -> None:
    """Rows of a factory depend on the files that it imports, in the project and its packages."""
    (tmp_path / "rows.py").write_text(
        "from helpers import tool\nimport inner.deep\n\n\ndef make():\n    return []\n"
    )
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers/__init__.py").write_text("")
    (tmp_path / "helpers/tool.py").write_text("from . import other\n")
    (tmp_path / "helpers/other.py").write_text("VALUE = 1\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/deep.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    recipe = validate(tiny_recipe(project=str(tmp_path), data={"source": "factory", "name": None,
                                                               "factory": "rows:make"}), "r")  # fmt: skip

    def key() -> str:
        return cache.cache_folder(recipe.data, recipe.project).name

    before = key()
    (tmp_path / "unused.py").write_text("changed = 1\n")
    assert key() == before
    for name in (
        "rows.py",
        "helpers/__init__.py",
        "helpers/tool.py",
        "helpers/other.py",
        "inner/deep.py",
    ):
        path = tmp_path / name
        path.write_text(path.read_text() + "# changed\n")
        assert key() != before, name
        before = key()
    shutil.rmtree(tmp_path / "helpers")
    assert key() != before
