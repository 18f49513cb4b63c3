"""The recorded code: what is in it, what is left out, and that it comes back."""

import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import tiny_recipe
from drumline.errors import RunError
from drumline.recipe.load import validate
from drumline.recipe.schema import Recipe
from drumline.runs.code import (
    FILE_LIMIT,
    MOST_LEFT_OUT,
    TOTAL_LIMIT,
    inside,
    read_code,
    restore_code,
)
from drumline.secrets import Secrets

NOTHING = Secrets({})


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with one commit, and the recipe's project in a folder of it."""
    top = tmp_path / "repository"
    (top / "recipes").mkdir(parents=True)
    git(top, "init", "-q")
    (top / ".gitignore").write_text("ignored.txt\nruns/\n")
    (top / "recipes/example_models.py").write_text("def mlp():\n    return 1\n")
    (top / "näme with space.txt").write_text("a\nb\n")
    git(top, "add", ".")
    git(top, "commit", "-qm", "first")
    return top / "recipes"


def recipe_in(project: Path) -> Recipe:
    return validate(tiny_recipe(project=str(project)), "r")


def test_commit_diff_and_untracked_files_come_back(project: Path, tmp_path: Path) -> None:
    """An edited file, a deleted one, a binary one and a new one: the worktree equals the original."""
    top = project.parent
    (project / "example_models.py").write_text("def mlp():\n    return 2\n")
    (top / "näme with space.txt").unlink()
    (project / "new.py").write_text("x = 'é'\r\n")
    code = read_code(recipe_in(project), tmp_path, NOTHING)
    assert code["commit"] == git(top, "rev-parse", "HEAD").strip()
    assert code["project"] == "recipes"
    assert code["untracked"] == {"recipes/new.py": "x = 'é'\r\n"}
    git(top, "checkout", "-q", ".")
    (project / "new.py").unlink()
    restored = restore_code(code, project, tmp_path / "restored")
    assert restored == tmp_path / "restored/recipes"
    assert (restored / "example_models.py").read_text() == "def mlp():\n    return 2\n"
    assert (restored / "new.py").read_bytes() == "x = 'é'\r\n".encode()
    assert not (tmp_path / "restored/näme with space.txt").exists()


def test_secrets_ignored_binary_large_files_and_runs_are_left_out(
    project: Path, tmp_path: Path
) -> None:
    """Each is named with the reason, ignored ones and other runs are not even named."""
    top = project.parent
    git(top, "remote", "add", "origin", "https://me:hunter2hunter2@example.org/r.git")
    (top / "ignored.txt").write_text("ignored")
    (top / ".env").write_text("A=1")
    (top / "notes.txt").write_text("key hf_abcdefghijklmnopqrstuvwxyz0123")
    (top / "weights.bin").write_bytes(b"\xff\xfe\x00\x01")
    (top / "big.txt").write_text("x" * (FILE_LIMIT + 1))
    (top / "link").symlink_to("/etc/passwd")
    (top / "out/run-1").mkdir(parents=True)
    (top / "out/run-1/record.json").write_text("{}")
    (top / "out/sweep-1").mkdir()
    (top / "out/sweep-1/sweep.json").write_text("{}")
    (top / "out/sweep-1/report.html").write_text("<html>")
    (project / "example_models.py").write_text("TOKEN = 'planted-secret-value'\n")
    secrets = Secrets({"MY_API_TOKEN": "planted-secret-value"})
    code = read_code(recipe_in(project), tmp_path, secrets)
    assert code["left_out"] == {
        "recipes/example_models.py": "holds a secret",
        ".env": "holds a secret",
        "notes.txt": "holds a secret",
        "weights.bin": "not text",
        "big.txt": f"{FILE_LIMIT + 1:,} bytes, over {FILE_LIMIT:,}",
        "link": "not a regular file",
    }
    assert code["untracked"] == {}
    assert code["diff"] == ""
    assert code["remote"] == "https://[secret]@example.org/r.git"


def test_what_is_too_large_is_not_searched_for_secrets(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of many megabytes takes minutes, and every run would begin with it."""
    searched: list[int] = []
    monkeypatch.setattr(Secrets, "are_in", lambda _, text: bool(searched.append(len(text))))
    (project.parent / "big.txt").write_text("x" * 5_000_000)
    git(project.parent, "add", "big.txt")
    (project / "small.py").write_text("y = 1\n")
    code = read_code(recipe_in(project), tmp_path, NOTHING)
    assert list(code["untracked"]) == ["recipes/small.py"]
    assert code["left_out"]["big.txt"].endswith(f"characters, over {FILE_LIMIT:,}")
    assert searched
    assert max(searched) <= FILE_LIMIT


def test_without_a_repository_the_factorys_file_is_kept(tmp_path: Path) -> None:
    """Its text and its digest are in the record, and restored from it."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p/example_models.py").write_text("def mlp(): ...\n")
    code = read_code(recipe_in(tmp_path / "p"), tmp_path, NOTHING)
    assert code["commit"] is None
    assert list(code["factories"]) == ["example_models.py"]
    restored = restore_code(code, tmp_path, tmp_path / "restored")
    assert (restored / "example_models.py").read_text() == "def mlp(): ...\n"


def test_a_commit_that_is_not_here_is_said(project: Path, tmp_path: Path) -> None:
    """The message names the commit and what to do."""
    code = read_code(recipe_in(project), tmp_path, NOTHING)
    with pytest.raises(RunError, match=r"commit 0123456789ab .*Nearest: git fetch"):
        restore_code({**code, "commit": "0123456789ab" + "0" * 28}, project, tmp_path / "restored")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", ".git/hooks/post-checkout", "a/.git/config"]
)
def test_a_recorded_name_cannot_lead_out(tmp_path: Path, name: str) -> None:
    """A record from elsewhere writes only into the folder that is made for it."""
    with pytest.raises(RunError, match="outside"):
        inside(tmp_path, name)


def test_a_link_inside_is_not_followed(tmp_path: Path) -> None:
    """A folder of the commit that is a link cannot carry a file elsewhere."""
    (tmp_path / "out").symlink_to("/tmp")
    with pytest.raises(RunError, match="link"):
        inside(tmp_path, "out/x")


def test_many_files_are_counted(project: Path, tmp_path: Path) -> None:
    """The record stays small whatever lies beside the code; what is left out is told."""
    for number in range(900):
        (project / f"note-{number:03d}.txt").write_text("x" * 5000)
    code = read_code(recipe_in(project), tmp_path, NOTHING)
    kept = TOTAL_LIMIT // 5000
    assert len(code["untracked"]) == kept
    assert len(code["left_out"]) == MOST_LEFT_OUT + 1
    assert code["left_out"]["…"] == f"{900 - kept - MOST_LEFT_OUT:,} more files"


def test_a_slow_git_is_told(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that takes too long costs its diff, never the run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text(
        f'#!/bin/sh\ncase "$*" in *" diff "*|*" ls-files "*) sleep 9;; *) {shutil.which("git")} "$@";; esac\n'
    )
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr("drumline.runs.code._GIT_S", 0.5)
    code = read_code(recipe_in(project), tmp_path, NOTHING)
    assert code["commit"]
    assert set(code["left_out"]) == {"the diff", "untracked files"}
