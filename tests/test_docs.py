"""Every command shown in the documentation is run, and the README's output is what comes out."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer
from test_shipped_recipes import LEARNS

from conftest import ROOT, SOURCES

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {
    "make demo": "tests/distributed/test_demo.py runs its two commands to the end",
    "make test": "this is it",
    "make lint": "run beside the tests by .ci/run",
    "drumline run tiny-code-lm": "tests/distributed/test_demo.py",
    "drumline plan runs/tiny-code-lm-1 --gpus 1": "tests/distributed/test_demo.py, on the run above",
    "drumline reproduce runs/tiny-code-lm-1 --gpus 1 --steps 15": "the same",
    "drumline report runs/tiny-code-lm-1": "the same",
}
"""Commands that another test runs, or that would run this one."""
ELSEWHERE |= {
    f"drumline run {name}": "tests/distributed/test_shipped_recipes.py, to the end"
    for name, (options, _, _) in LEARNS.items()
    if not options
}


def commands(page: Path) -> list[str]:
    """Lines of the page's `sh` blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(
    line: str, folder: Path, fork_server: ForkServer | None = None
) -> subprocess.CompletedProcess[str]:
    """A line of a page; `drumline` by a process that the server forks, where there is one."""
    words = shlex.split(line)
    if words[0] == "drumline" and fork_server:
        return fork_server.run(folder, *words[1:], timeout=300)
    if words[0] == "drumline":
        words[:1] = [sys.executable, "-m", "drumline.cli"]
    elif words[0] == "python":
        words[0] = sys.executable
    env = {**os.environ, "PYTHONPATH": SOURCES}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_the_page_runs(
    page: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """In order, in one folder: each exits 0, or with the code that the page names: `# exit 3`.

    The README's are started as a user would; the others' are forked, which spares their imports.
    """
    server = None if page.name == "README.md" else fork_server
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "docs/examples", tmp_path / "docs/examples")
    text = page.read_text()
    for line in commands(page):
        if line in ELSEWHERE or line.startswith(("python benchmarks/", "pip install", "git clone")):
            continue
        if server and line.startswith("drumline verify") and line in commands(ROOT / "README.md"):
            continue  # it needs nothing of the page's folder, and is run with the README's
        named = re.search(rf"^{re.escape(line)}\s+# exit (\d+)", text, flags=re.MULTILINE)
        done = run(line, tmp_path, server)
        assert done.returncode == (int(named[1]) if named else 0), f"{line}\n{done.stderr}"


def test_the_readme_shows_the_real_output_of_plan() -> None:
    """The first screen's table is word for word what the command prints in a fresh clone."""
    text = (ROOT / "README.md").read_text()
    command, shown = re.search(
        r"```console\n\$ (drumline plan .*?)\n(.*?)```", text, flags=re.DOTALL
    ).groups()  # type: ignore[union-attr]
    done = run(command, ROOT)
    assert done.stdout == shown


def test_benchmarks_and_make_targets_in_the_docs_exist() -> None:
    """A page names no script or target that is not there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for line in commands(page):
            if line.startswith("python benchmarks/"):
                assert (ROOT / line.split()[1]).is_file(), line
            if line.startswith("make "):
                assert line.split()[1] in targets, line


def test_every_recipe_key_is_documented() -> None:
    """docs/recipe.md names each key of the schema."""
    from drumline.recipe.schema import Recipe
    from plan.test_fields import _fields

    text = (ROOT / "docs/recipe.md").read_text()
    for name in _fields(Recipe):
        key = name.split(".")[-1]
        assert re.search(rf"\b{re.escape(key)}\b", text), name


def test_the_python_that_the_page_shows_runs(tmp_path: Path) -> None:
    """The block of docs/python.md, as a script of its own."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.DOTALL
    )
    env = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d GiB of 79\.1 GiB, fits\n", done.stdout)
