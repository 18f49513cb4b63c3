"""`drumline cache`: what is there, and removing it."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from drumline.data.cache_entries import entries
from drumline.data.prepare import prepare
from drumline.recipe.data_section import Data


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three prepared data sets, the third last used 40 days ago, in a cache of this test."""
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "cache"))
    found = []
    for size in (300, 200, 100):
        path = tmp_path / f"{size}.txt"
        path.write_text("some text\n" * size)
        data = Data(source="files", path=str(path), task="causal_lm", sequence_length=16)
        found.append(prepare(data, None))
    old = time.time() - 40 * 86400
    for path in (found[2], *found[2].rglob("*")):
        os.utime(path, (old, old))
    return found


def test_sizes_ages_and_origins(three: list[Path], forked: Any) -> None:
    """The largest first, the sum last; nothing is written anywhere."""
    done = forked("cache")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [path.name for path in three]
    assert "300.txt, causal_lm, bytes" in lines[0]
    assert " 40 days " in lines[2]
    assert last.startswith("3 entries, ")
    assert [entry.path for entry in entries()] == three


def test_what_is_named_is_removed(three: list[Path], forked: Any) -> None:
    """By the beginning of a key, by age, all of it; what is named wrongly removes nothing."""
    for arguments, words in (
        (["rm"], "nothing is named"),
        (["rm", "zz"], "'zz' names no entry"),
        (["rm", three[0].name, ""], "'' names no entry"),
    ):
        done = forked("cache", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
    assert all(path.exists() for path in three)
    done = forked("cache", "rm", "--older-than", "30")
    assert "removed 1 entries" in done.stdout
    assert [path.exists() for path in three] == [True, True, False]
    assert forked("cache", "rm", three[0].name[:12]).returncode == 0
    assert [path.exists() for path in three] == [False, True, False]
    assert forked("cache", "rm", "--all").returncode == 0
    assert entries() == []
    assert not list(three[1].parent.iterdir())
