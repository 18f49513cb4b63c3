"""Whether a factory's model may have BatchNorm, found from its source files without running them."""

import ast
import sys
from pathlib import Path
from typing import Literal

from drumline.data.factory import factory_file, places_of
from drumline.errors import DataError

Found = Literal["yes", "no", "unknown"]

_KNOWN = {"torch", "numpy"}
"""Packages whose names tell by themselves: a BatchNorm of torch has that name."""
_LOADS_CODE = ("hub", "jit", "load")
"""Attributes of torch that make a model of files."""


def batchnorm_of(name: str, project: str | None) -> Found:
    """Whether the function `module:function`, or what it uses, names a BatchNorm.

    Follows names through the project's files; `unknown` where it uses another package, whose models can only
    be looked at once they are built.
    """
    first = factory_file(name, project)
    base = Path(project or ".")
    waiting, seen = [(first, name.partition(":")[2])], set()
    is_unknown = False
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        path, symbol = place
        if "BatchNorm" in symbol:
            return "yes"
        found = _File(path, base)
        for used in found.uses(symbol):
            if "BatchNorm" in used:
                return "yes"
            is_unknown |= used in found.foreign
            waiting += [(path, used)] if used in found.definitions else found.own.get(used, [])
    return "unknown" if is_unknown else "no"


class _File:
    """One file of the project: its definitions, and the names that it imports.

    `foreign`: names of other packages. `own`: for names of other files of the project, where to look.
    """

    def __init__(self, path: Path, base: Path) -> None:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise DataError(f"factory: {path} is not Python: {error}") from None
        self.definitions = {
            node.name: node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        self.foreign: set[str] = set()
        self.own: dict[str, list[tuple[Path, str]]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._import(
                        base, path, alias.name, alias.asname or alias.name.split(".")[0], "*"
                    )
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    self._import(base, path, module, alias.asname or alias.name, alias.name)

    def _import(self, base: Path, path: Path, module: str, known_as: str, symbol: str) -> None:
        places = places_of(base, path, module)
        if symbol != "*":
            joint = "" if module.endswith(".") else "."
            places += places_of(base, path, f"{module}{joint}{symbol}")
        if places:
            self.own[known_as] = [(place, symbol) for place in places]
        elif module.split(".")[0] not in _KNOWN | sys.stdlib_module_names or symbol in _LOADS_CODE:
            self.foreign.add(known_as)

    def uses(self, symbol: str) -> set[str]:
        """Names that a definition uses; with `*`, or for what is no definition, those of the whole file."""
        chosen = (
            [self.definitions[symbol]] if symbol in self.definitions else self.definitions.values()
        )
        names = set()
        for definition in chosen:
            for node in ast.walk(definition):
                if isinstance(node, ast.Name):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute):
                    names.add(node.attr)
        return names
