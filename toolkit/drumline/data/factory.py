"""Loads `module:function` from the recipe's project folder, the only code that a recipe can name."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from drumline.errors import DataError


def factory_file(name: str, project: str | None) -> Path:
    """The Python file of `module:function`, in the project folder; DataError where it does not exist."""
    module = name.partition(":")[0]
    path = Path(project or ".") / f"{module}.py"
    if not path.is_file():
        raise DataError(f"factory {name!r}: {path} does not exist; factories lie beside the recipe")
    return path


def factory_files(names: Iterable[str], project: str | None) -> list[Path]:
    """The project's Python files that these factories run: their own, and those that they import in turn.

    Found from the import statements; files of installed packages are not among them.
    """
    base = Path(project or ".")
    waiting = [factory_file(name, project) for name in names]
    found: list[Path] = []
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        found.append(path)
        waiting += [place for name in _imports_of(path) for place in places_of(base, path, name)]
    return found


def _imports_of(path: Path) -> list[str]:
    """Dotted names that a file imports, relative ones with their leading dots; none if it is not Python."""
    import ast

    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            joint = "" if module.endswith(".") or not module else "."
            names += [module, *(f"{module}{joint}{alias.name}" for alias in node.names)]
    return names


def places_of(base: Path, importer: Path, name: str) -> list[Path]:
    """The project's files of an imported module: the packages on the way to it, and itself."""
    dots = len(name) - len(name.lstrip("."))
    folder = base
    if dots:
        folder = importer.parent
        for _ in range(dots - 1):
            folder = folder.parent
    found, parts = [], [part for part in name.split(".") if part]
    for count in range(1, len(parts) + 1):
        stem = folder.joinpath(*parts[:count])
        found += [
            place for place in (stem.with_suffix(".py"), stem / "__init__.py") if place.is_file()
        ]
    return found


def load_factory(name: str, project: str | None) -> Callable[..., Any]:
    """Import the file and return the function.

    The file may import other files of its folder, which is appended to `sys.path` so that installed packages
    take precedence.
    """
    path = factory_file(name, project)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    function = name.partition(":")[2]
    unique = f"drumline_project_{path.stem}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise DataError(f"factory {name!r}: {path} has no function {function!r}")
    return getattr(module, function)  # type: ignore[no-any-return]
