"""Messages that name a fix ("Nearest: …"): where the product prints them, and which tests follow them.

A test that follows a message calls `heard` with words of it, or has a `Row` for it in its table. Both are
found in the tests' source, so that a message which no test follows is noticed without running any.
"""

import ast
import functools
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from drumline.cli import COMMANDS
from drumline.errors import DrumlineError

ROOT = Path(__file__).resolve().parent.parent


Parts = list[str | None]
"""A message's constant parts in order; None stands for what is filled in."""


def skeletons(*places: str) -> list[tuple[str, Parts]]:
    """Where each message with advice stands below these folders, and its parts."""
    found = []
    for path in sorted(path for place in places for path in (ROOT / place).rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            parts: Parts
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else None for v in node.values]
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in inner
            ):
                parts = [node.value]
            else:
                continue
            text = "".join(part for part in parts if part)
            if "Nearest:" in text and '"""' not in text and "\n\n" not in text:
                found.append((f"{path.name}:{node.lineno}", parts))
    return found


def pattern_of(parts: Parts) -> str:
    """A regular expression that each such message matches."""
    return "".join(".*" if part is None else re.escape(part) for part in parts)


_LEAST = 10
"""Constant characters that words must share with a message to be of it."""


def are_of(words: str, parts: Parts) -> bool:
    """Whether these can be words of the message: they share constant text with it, in its order.

    Words of the problem, before "Nearest", are compared with the problem alone, since several messages name
    the same fix.
    """
    problem, _, fix = "".join("\0" if part is None else part for part in parts).partition(
        "Nearest:"
    )
    said, named, advised = words.partition("Nearest:")
    if not named:
        found = max(_shared(said, text.split("\0")) for text in (problem, fix))
        return found >= _LEAST
    if len(said) > _LEAST:
        return _shared(said, problem.split("\0")) >= _LEAST
    return _shared(said, problem.split("\0")) + _shared(advised, fix.split("\0")) >= _LEAST


def _shared(words: str, constants: list[str]) -> int:
    """Most characters of `constants` in these words, read as a piece of a text with anything between them."""
    best = len(words) if any(words in constant for constant in constants) else 0
    for number, constant in enumerate(constants):
        best = max(best, _after_gap(words, constants[number:]))
        for size in range(1, min(len(constant), len(words)) + 1):
            if words.startswith(constant[-size:]):
                best = max(best, size + _after_gap(words[size:], constants[number + 1 :]))
    return best


def _after_gap(words: str, constants: list[str]) -> int:
    """The same where the words begin with what is filled in before the first of `constants`."""
    if not constants or not words:
        return 0
    first, rest = constants[0], constants[1:]
    ends = (size for size in range(len(first), 0, -1) if words.endswith(first[:size]))
    best = next(ends, 0)
    at = words.find(first)
    while first and at >= 0:
        best = max(best, len(first) + _after_gap(words[at + len(first) :], rest))
        at = words.find(first, at + 1)
    return best


@dataclass(frozen=True)
class Row:
    """Words of a message, what makes it appear, and every way to follow it."""

    words: str
    wrong: Any
    ways: list[Any]


def heard(words: str, told: str) -> str:
    """The message `told`, which must name a fix and contain these words."""
    assert "Nearest" in told, told
    assert words in told, told
    return told


def followed_words() -> Iterator[str]:
    """The words of every `heard` and `Row` in the tests."""
    for path in sorted((ROOT / "tests").glob("*/test_*.py")):
        text = path.read_text()
        if "from advice import" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("heard", "Row"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@functools.cache
def _app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    for module in dict.fromkeys(COMMANDS.values()):
        import_module(f"drumline.cli.{module}").register(app)
    return app


def command(*arguments: str) -> Done:
    """`drumline ARGUMENTS` in this process, in its current folder; errors as `drumline` prints them."""
    done = CliRunner().invoke(_app(), list(arguments))
    error = done.exception
    if isinstance(error, DrumlineError):
        return Done(error.exit_code, done.stdout, f"{done.stderr}drumline: {error}")
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return Done(done.exit_code, done.stdout, done.stderr)


def refused(*arguments: str) -> str:
    """What `drumline ARGUMENTS` prints to stderr; it must fail with an error that users can fix."""
    done = command(*arguments)
    assert done.code in (2, 3, 4), done
    return done.err


def worked(*arguments: str) -> Done:
    """`drumline ARGUMENTS`, which must succeed."""
    done = command(*arguments)
    assert done.code == 0, done.err
    return done


def command_in(told: str, **values: str) -> list[str]:
    """The arguments of the first `drumline …` that the advice names; `values` replace words of it."""
    advice = told.partition("Nearest:")[2]
    quoted = re.search(r"`drumline ([^`]+)`", advice)
    plain = re.search(r"drumline ([^,;\n]+)", advice)
    found = quoted or plain
    assert found, told
    words = shlex.split(found[1])
    return [functools.reduce(lambda w, v: w.replace(*v), values.items(), word) for word in words]


LM = "finished-lm"
"""A run of a language model without code of its own; `finished-mlp` has a factory."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, whose name needs quotes in a shell, with runs of an older version and a cache of its own."""
    folder = tmp_path / "my work"
    shutil.copytree(ROOT / "tests/fixtures/format_2", folder)
    for path in folder.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


def change_record(run: Path, **changes: Any) -> None:
    """Replace keys of a run's record."""
    path = run / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


PARTITIONS = """PartitionName=batch Default=YES MaxTime=02:00:00 MaxNodes=UNLIMITED TotalNodes=8
PartitionName=long Default=NO MaxTime=7-00:00:00 MaxNodes=2 TotalNodes=8"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH: a Slurm of eight nodes that takes every job, and a kubectl that does too.

    Stands in for Slurm and Kubernetes; tests/cluster asks a real one. A job is in the queue while the file
    `queued` is there.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {
        "sbatch": "echo 17",
        "scontrol": f"""case "$2" in
            partition) echo '{PARTITIONS}';;
            job) test -e {folder}/queued && echo "JobId=$4 JobState=PENDING Reason=Resources";;
            *) exit 1;;
        esac""",
        "scancel": f"rm -f {folder}/queued",
        "sacct": "exit 1",
        "sinfo": "yes '8|16000|gpu:h100:8' | head -8",
        "sacctmgr": "echo 'lab|high,normal'",
        "kubectl": "cat > /dev/null",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder
