"""Writes the reference: tables of keys in docs/recipe.md, docs/commands.md, recipes/recipe.schema.json.

python docs/make_reference.py [--check]    # --check only tells what is stale
"""

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from drumline.cli import COMMANDS, app
from drumline.recipe.keys import Key, json_schema, keys, keys_in

DOCS = Path(__file__).parent
_MARK = re.compile(r"<!-- keys: (.*?) -->\n.*?<!-- end -->", re.DOTALL)


def recipe_page(text: str) -> str:
    """The page with a table of its section's keys after each mark `<!-- keys: SECTION -->`."""
    return _MARK.sub(
        lambda found: f"<!-- keys: {found[1]} -->\n{_table(found[1])}<!-- end -->", text
    )


def _table(section: str) -> str:
    names = [""] if section == "top" else section.split(", ")
    shown = [key for name in names for key in _below(name)]
    rows = [
        f"| `{key.name}` | {_meaning(key)} | {_code(key.default)} | {_code(key.example)} |"
        for key in shown
    ]
    return "\n".join(["| key | meaning | default | example |", "|---|---|---|---|", *rows, ""])


def _below(section: str) -> Iterator[Key]:
    """The keys of a section, each section within it right after its own key."""
    for key in keys_in(section):
        if section or not key.is_section:
            yield key
        if section and key.is_section and key.name not in ("data.evaluation", "data.mixture"):
            yield from _below(key.name)
    if section == "data":
        yield from (
            key
            for key in keys().values()
            if key.name in ("data.mixture.weight", "data.mixture.label")
        )


def _meaning(key: Key) -> str:
    unit = f" In {key.unit}." if key.unit else ""
    page = f" ([{key.page}]({key.page}))" if key.page and key.page != "recipe.md" else ""
    kind = "" if key.is_section else f" *{key.kind}*"
    return f"{key.meaning.replace('|', chr(92) + '|')}{unit}{page}{kind}"


def _code(text: str) -> str:
    return f"`{text}`" if text and not text.startswith(("required", "those of", "none")) else text


def commands_page() -> str:
    """Every command with its arguments and options."""
    for name in dict.fromkeys(COMMANDS.values()):
        import_module(f"drumline.cli.{name}").register(app)
    group: Any = typer.main.get_command(app)
    parts = [_HEAD]
    for name in COMMANDS:
        parts += _command(name, group.commands[name])
    return "\n".join(parts)


def _command(name: str, command: Any) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    text = (command.help or "").strip().split("\n\n")
    yield f"## {name}\n"
    yield "\n\n".join(" ".join(part.split()) for part in text) + "\n"
    for one in [command] if inner is None else inner.values():
        words = name if inner is None else f"{name} {one.name}"
        arguments = [p for p in one.params if p.param_type_name == "argument"]
        metavars = " ".join(str(p.metavar or p.name.upper()) for p in arguments)
        yield (
            f"`drumline {words}{' ' + metavars if metavars else ''}`"
            + ("" if inner is None else f": {' '.join((one.help or '').split())}")
            + "\n"
        )
        context = typer.Context(one)
        records = [p.get_help_record(context) for p in one.params if p.param_type_name == "option"]
        rows = [f"| `{record[0]}` | {record[1]} |" for record in records if record]
        if rows:
            yield "\n".join(["| option | |", "|---|---|", *rows, ""])


_HEAD = """# Commands

Made of the commands themselves by `docs/make_reference.py`; `drumline COMMAND -h` prints the same. `--debug`
anywhere shows the traceback of an error.

Exit codes: 0; 2 a mistake in recipe, data or command line; 3 the plan does not fit; 4 the run failed;
5 two trainings differ; 75 stopped by a signal, and can be resumed.
"""


def pages() -> dict[Path, str]:
    """What each page should be."""
    recipe = DOCS / "recipe.md"
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    return {
        recipe: recipe_page(recipe.read_text(encoding="utf-8")),
        DOCS / "commands.md": commands_page(),
        DOCS.parent / "recipes/recipe.schema.json": f"{schema}\n",
    }


def main() -> int:
    """Write the pages, or tell which are stale."""
    found = pages()
    if "--check" in sys.argv:
        stale = [
            path.name for path, text in found.items() if path.read_text(encoding="utf-8") != text
        ]
        print(f"stale: {', '.join(stale) or 'none'}")
        return int(bool(stale))
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
