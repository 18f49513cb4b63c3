"""CONTRIBUTING.md names files and functions that exist, and its walks are short."""

import ast
import re

import pytest

from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BASES = [ROOT / "toolkit/drumline", ROOT / "launchers", ROOT]
PATH = re.compile(r"`([\w/.-]+(?:\.py|\.yaml|\.md|/))`")
NAMED = re.compile(r"`([\w/]+\.py)`((?: (?:and )?`(?![\w/.]*\.py)[\w.]+`)+)")
"""A file and the names that follow it: `plan/resolve.py` `resolve`."""


def find(path: str) -> list[str]:
    """Where a path of the page lies, from any source root."""
    return [str(base / path) for base in BASES if (base / path).exists()]


def names_in(path: str) -> set[str]:
    """All functions, classes and assigned names of a file, those of classes included."""
    tree = ast.parse(open(find(path)[0]).read())  # noqa: SIM115
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", sorted(set(PATH.findall(TEXT))))
def test_every_file_that_is_named_exists(path: str) -> None:
    """A path on the page is a file or folder of the product, or of the repository."""
    assert find(path), path


@pytest.mark.parametrize(("path", "names"), sorted(set(NAMED.findall(TEXT))))
def test_every_name_that_follows_a_file_is_in_it(path: str, names: str) -> None:
    """`file` `name` means that the file defines the name."""
    for name in re.findall(r"`([\w.]+)`", names):
        assert set(name.split(".")) <= names_in(path), f"{name} is not in {path}"


def test_each_walk_has_at_most_eight_lines() -> None:
    """Five walks, each of at most eight lines."""
    section = TEXT.split("## Five walks", 1)[1].split("\n## ", 1)[0]
    walks = re.split(r"^\*\*From|^\*\*One", section, flags=re.M)[1:]
    assert len(walks) == 5
    assert all(2 <= len(walk.strip().splitlines()) - 1 <= 8 for walk in walks)


def test_no_two_test_files_have_one_name() -> None:
    """pytest collects by name, so the second of two would be an error, but only where both are collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
