"""Every command with each of stdin, stdout and stderr closed or full, and under other encodings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands_here import call
from test_readers import READERS, desk

from conftest import SOURCES

__all__ = ["desk"]

COMMANDS = {
    **READERS,
    "recipes": ("recipes",),
    "schema": ("schema",),
    "plan --json": ("plan", "r", "--json"),
    "status --json": ("status", "r", "--json"),
    "runs --json": ("runs", ".", "--json"),
    "an unknown recipe": ("plan", "nothing.yaml"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stream_that_is_closed_or_full(desk: Path, command: str) -> None:
    """The exit code stays the command's; only a full stdout is told, in one message, with 74; never a traceback."""
    words = COMMANDS[command]
    usual = call(desk, *words)
    for closed in (0, 1, 2):
        done = call(desk, *words, closed=closed)
        assert done.code == usual.code, (closed, done)
        assert "Traceback" not in done.err
        if closed != 1 and command != "runs --json":  # which tells ages
            assert done.out == usual.out
    done = call(desk, *words, full=2)
    assert done.code == usual.code
    assert len(done.out) == pytest.approx(len(usual.out), abs=9)  # ages differ in digits
    done = call(desk, *words, full=1)
    assert "Traceback" not in done.err
    if usual.out:
        assert done.code == 74
        told = f"standard output: No space left on device; the command itself ended with exit code {usual.code}"
        assert done.err.count(told) == 1
    else:
        assert done.code == usual.code


LATIN = "a locale of ISO-8859-1"
LOCALES = {
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"PYTHONIOENCODING": "ascii"},
    LATIN: {"LC_ALL": "de_DE.ISO-8859-1"},
}


@pytest.fixture(scope="module")
def latin_locale(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a compiled ISO-8859-1 locale; a skip where its sources are not installed."""
    folder = tmp_path_factory.mktemp("locales")
    made = subprocess.run(
        ["localedef", "--no-archive", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")],
        capture_output=True, text=True,
    )  # fmt: skip
    if not (folder / "de_DE.ISO-8859-1").is_dir():
        pytest.skip(f"localedef: {made.stderr}; .ci/run installs locales")
    return {"LOCPATH": str(folder)}


@pytest.mark.parametrize("encoding", LOCALES)
def test_files_are_utf8_whatever_the_locale(
    tmp_path: Path, encoding: str, request: pytest.FixtureRequest
) -> None:
    """An umlaut in folder, data, cache and description: trained, planned and told alike; signs become ASCII ones."""
    variables = dict(LOCALES[encoding])
    if encoding == LATIN:
        variables |= request.getfixturevalue("latin_locale")
    folder = tmp_path / "Übung"
    folder.mkdir()
    (folder / "größe.txt").write_text("Grüße an alle. " * 200, encoding="utf-8")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    env = {
        **os.environ,
        "PYTHONPATH": SOURCES,
        **variables,
        "DRUMLINE_CACHE": str(folder / "Zwischenspeicher-ä"),
    }
    env.pop("LANG", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-P", "-m", "drumline.cli", *arguments]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, timeout=120, check=False
        )

    trained = run("run", "r.yaml", "--run-dir", "läuft", "--json")
    assert trained.returncode == 0, trained.stderr.decode(errors="replace")
    assert b'"steps": 2' in trained.stdout
    record = (folder / "läuft/record.json").read_text(encoding="utf-8")
    assert "größe.txt" in record
    assert "eine Übung" in record
    planned = run("plan", "läuft")
    assert planned.returncode == 0, planned.stderr
    sign = "\xd7" if encoding == LATIN else "x"
    code = "iso-8859-1" if encoding == LATIN else "ascii"
    assert f"4 = 4 per_device {sign} 1 gpus" in planned.stdout.decode(code)
    for words in (("status", "läuft"), ("doctor", "läuft"), ("runs", "."), ("logs", "läuft"), ("compare", "läuft", "läuft"),
                  ("export", "läuft", "größer"), ("report", "läuft")):  # fmt: skip
        done = run(*words)
        assert done.returncode in (0, 4), done.stderr
        assert b"Traceback" not in done.stderr


RECIPE = """\
recipe: tiny
schema: 1
description: eine Übung
model: {source: config, architecture: gpt2, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32, vocab_size: 300}}
data: {source: files, path: größe.txt, task: causal_lm, sequence_length: 16}
batch: {effective: 4, per_device: 4, gpus: 1}
optimizer: {name: adamw, lr: 1e-3}
duration: {steps: 2}
"""
