"""Messages that name a fix ("Nearest: …"): where the product prints them, and which tests follow them.

A test that follows a message calls `heard` with words of it, or has a `Row` for it in its table. Both are
found in the tests' source, so that a message which no test follows is noticed without running any.
"""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from drumline.cli import COMMANDS
from drumline.errors import DrumlineError

ROOT = Path(__file__).resolve().parent.parent


def skeletons(*places: str) -> list[tuple[str, str]]:
    """Where each message with advice stands below these folders, and its constant parts as a pattern."""
    found = []
    for path in sorted(path for place in places for path in (ROOT / place).rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in inner
            ):
                parts = [node.value]
            else:
                continue
            text = "".join(str(part) for part in parts if part)
            if "Nearest:" in text and '"""' not in text and "\n\n" not in text:
                pattern = "".join(".*" if part is None else re.escape(str(part)) for part in parts)
                found.append((f"{path.name}:{node.lineno}", pattern))
    return found


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
