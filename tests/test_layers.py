"""The rules between the layers, each held by a test; CONTRIBUTING.md draws them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SOURCES

PRODUCT = {"drumline": ROOT / "toolkit/drumline", "drumline_launchers": ROOT / "launchers/drumline_launchers"}  # fmt: skip

LAYERS: list[tuple[str, ...]] = [
    ("errors", "units", "files", "output", "processes", "secrets", "phases", "rank_files", "hang_timeout", "metrics_file", "after_files"),
    ("recipe",),
    ("architectures",),
    ("data", "checkpoint"),
    ("memory",),
    ("plan",),
    ("train",),
    ("trace",),
    ("runs",),
    ("launchers",),
    ("cluster", "supervise", "compare"),
    ("session",),
    ("cli", "api"),
]  # fmt: skip
"""Lowest first. A module imports from layers below its own and from its own part, never beside or above.

The lowest layer's files are one part: they import each other, without a circle.
"""

HEAVY = {"torch", "transformers", "datasets", "wandb", "accelerate", "deepspeed"}
IMPURE = {"os", "time", "datetime", "random", "subprocess", "socket", "urllib", "requests"}


def part_of(module: str) -> str | None:
    """`drumline.plan.mesh` -> `plan`; None for what is not ours."""
    names = module.split(".")
    if names[0] == "drumline_launchers":
        return "launchers"
    if names[0] != "drumline" or (len(names) > 1 and names[1].startswith("__")):
        return None
    return names[1] if len(names) > 1 else "__init__"


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package, folder in PRODUCT.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def level(part: str) -> int:
    """Which layer a part is in."""
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def upward_imports(part: str, imported: set[str]) -> set[str]:
    """Those of a module's imports that do not point down."""
    bad = set()
    for name in imported:
        other = part_of(name)
        if other in (None, "__init__", part):
            continue
        beside = level(other) == level(part) and level(part) > 0
        if level(other) > level(part) or beside:
            bad.add(name)
    return bad


def test_every_part_has_a_layer() -> None:
    """Nothing of the product lies outside the drawing, and the drawing names nothing that is not there."""
    known = {part for parts in LAYERS for part in parts}
    found = {part_of(name) for name in modules()} - {"__init__"}
    assert found == known


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down_only(name: str) -> None:
    """No module imports from a part beside or above its own."""
    part = part_of(name)
    assert part
    if part != "__init__":
        assert not upward_imports(part, imports_of(ast.parse(modules()[name].read_text())))


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_an_upward_import_is_seen(number: int) -> None:
    """The rule is not blind in any layer: an import of the next one up, planted, is found, also in a function."""
    part = LAYERS[number][0]
    above = LAYERS[number + 1][0] if number + 1 < len(LAYERS) else None
    if above is None:
        return
    package = "drumline_launchers" if above == "launchers" else f"drumline.{above}"
    for source in (f"import {package}.x", f"def f():\n    from {package} import x"):
        assert upward_imports(part, imports_of(ast.parse(source)))
    if len(LAYERS[number]) > 1 and number:
        beside = f"from drumline.{LAYERS[number][1]} import x"
        assert upward_imports(part, imports_of(ast.parse(beside)))


def test_no_two_modules_import_each_other() -> None:
    """There is no circle of imports between any modules, not even inside functions."""
    found = modules()
    graph = {name: {other for other in imports_of(ast.parse(path.read_text())) if other in found and other != name}
             for name, path in found.items()}  # fmt: skip
    packages = {name for name in found if found[name].name == "__init__.py"}
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        state[name] = 1
        for other in sorted(graph[name] - packages):
            assert state.get(other) != 1, " -> ".join([*trail, name, other])
            if other not in state:
                visit(other, [*trail, name])
        state[name] = 2

    for name in sorted(found):
        if name not in state:
            visit(name, [])


def test_commands_hold_no_services() -> None:
    """A command's file is imported by nobody; what several commands take is in cli/options.py."""
    for name, path in modules().items():
        if part_of(name) == "cli" and name != "drumline.cli.__main__":
            for other in imports_of(ast.parse(path.read_text())):
                if other.startswith("drumline.cli"):
                    assert other.startswith("drumline.cli.options") or other == "drumline.cli", (name, other)  # fmt: skip


def is_pure(part: str, path: Path) -> bool:
    """recipe (but for reading its file), architectures, memory and plan."""
    return part in ("architectures", "memory", "plan") or (
        part == "recipe" and path.name not in ("load.py", "catalogue.py")
    )


@pytest.mark.parametrize(
    "name", [n for n, path in sorted(modules().items()) if is_pure(part_of(n) or "", path)]
)
def test_the_core_is_pure(name: str) -> None:
    """No environment, clock, network or processes in the recipe, the shapes, the memory and the plan."""
    source = modules()[name].read_text()
    assert not {module.split(".")[0] for module in imports_of(ast.parse(source))} & IMPURE
    assert "environ" not in source


def test_torch_is_imported_in_train_and_trace_only() -> None:
    """Outside these two no module imports torch, accelerate or deepspeed, not even in a function."""
    for name, path in modules().items():
        if part_of(name) not in ("train", "trace"):
            found = {n.split(".")[0] for n in imports_of(ast.parse(path.read_text()))}
            assert not found & {"torch", "accelerate", "deepspeed"}, name


PLAN = "import sys; sys.argv = ['drumline', 'plan', {arguments}]\nfrom drumline.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e"


def loaded_by(program: str) -> set[str]:
    """Every module that a program has imported when it ends."""
    tail = "\nimport sys, json; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program + tail],
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import drumline.plan.resolve, drumline.plan.resplit, drumline.plan.advise",
        "import drumline_launchers",
        "import drumline.supervise.supervisor, drumline.runs.folder, drumline.session.progress",
        PLAN.format(arguments="'llama-8b-8xh100'"),
        PLAN.format(arguments="'worked-example', '--json', '--gpus', '2'"),
    ],
)
def test_a_dry_run_imports_nothing_heavy(program: str) -> None:
    """plan, launchers, supervise and runs never import torch, transformers, datasets or wandb."""
    loaded = {name.split(".")[0] for name in loaded_by(program)}
    assert not loaded & HEAVY
    assert "numpy" not in loaded


LIBRARIES = """
import yaml, typer
from pydantic import BaseModel, Field
class One(BaseModel):
    value: int = Field(ge=1)
One.model_validate({"value": 1})
"""
MOST_OWN, MOST_OTHERS = 90, 6
"""Modules that a dry run may import beyond those of its libraries: drumline's, and everything else.

Drumline's own include five that every plan needs: what config classes take, output that never raises, bars, and the
allocator model with its events, since a verdict comes from a replay.
"""


def test_a_dry_run_imports_few_modules() -> None:
    """The count cannot creep up unseen; the slow ones that once did are named (benchmarks/cold_plan.py)."""
    more = loaded_by(PLAN.format(arguments="'llama-8b-8xh100'")) - loaded_by(LIBRARIES)
    own = {name for name in more if part_of(name) is not None}
    assert len(own) <= MOST_OWN, sorted(own)
    assert len(more - own) <= MOST_OTHERS, sorted(more - own)
    assert not more & {"importlib.metadata", "email", "socket", "statistics", "numpy", "rich"}


def test_nothing_unsafe_is_called() -> None:
    """No pickle, no shell, no eval, no remote code, no unsafe YAML anywhere in the product."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                unsafe = {"eval", "exec", "os.system", "torch.load", "torch.save"}
                assert name not in unsafe, (path, name)
                assert not name.startswith(("pickle.", "marshal.")), (path, name)
                for keyword in node.keywords:
                    value = ast.unparse(keyword.value)
                    assert not (keyword.arg == "shell" and value == "True"), path
                    assert keyword.arg != "trust_remote_code" or value == "False", path
                    assert keyword.arg != "use_safetensors" or value == "True", path


def test_the_product_does_not_need_shared_notes() -> None:
    """No file of the product points outside the repository."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.is_file()
            and path.suffix in {".py", ".md", ".toml", ".yaml"}
            and name != "tests/test_layers.py"
        ):
            assert "../shared" not in path.read_text(), name
