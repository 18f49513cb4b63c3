"""`-h` of every command has an example that the command takes."""

import re
import shlex
from importlib import import_module
from typing import Any

import pytest
import typer

from drumline.cli import COMMANDS, app


def commands() -> dict[str, Any]:
    """Every command by its words, those of groups too."""
    for name in dict.fromkeys(COMMANDS.values()):
        import_module(f"drumline.cli.{name}").register(app)
    group: Any = typer.main.get_command(app)
    found = {}
    for name in COMMANDS:
        inner = getattr(group.commands[name], "commands", None)
        found |= (
            {f"{name} {key}": one for key, one in inner.items()}
            if inner
            else {name: group.commands[name]}
        )
    return found


FOUND = commands()


@pytest.mark.parametrize("words", FOUND)
def test_it_has_an_example_that_it_takes(words: str) -> None:
    """Every option of the example is one of the command's, and every argument that is required is there."""
    (example,) = re.findall(r"Example: (drumline .*)", FOUND[words].help)
    given = shlex.split(example)[1:]
    assert given[: len(words.split())] == words.split()
    context = FOUND[words].make_context(words, given[len(words.split()) :], resilient_parsing=False)
    assert not context.args
