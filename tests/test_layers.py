"""The rules between the layers, each held by a test."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HEAVY = {"torch", "transformers", "datasets", "wandb", "accelerate", "deepspeed"}


@pytest.mark.parametrize(
    "program",
    [
        "import toolkit.plan.resolve, toolkit.plan.resplit, toolkit.plan.advise",
        "import launchers",
        "import toolkit.runs.supervise, toolkit.runs.folder, toolkit.runs.progress",
        "import sys; sys.argv = ['drumline', 'plan', 'llama-8b-8xh100']\nfrom toolkit.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e",
        "import sys; sys.argv = ['drumline', 'plan', 'worked-example', '--json', '--gpus', '2']\nfrom toolkit.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e",
    ],
)
def test_a_dry_run_imports_nothing_heavy(program: str) -> None:
    """plan, launchers and runs never import torch, transformers, datasets or wandb."""
    tail = "\nimport sys, json; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program + tail], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert not loaded & HEAVY
    assert "numpy" not in loaded


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


TORCHLESS = sorted(
    {p.name for p in (ROOT / "toolkit/memory").glob("*.py")} - {"trace.py", "kernels.py"}
)
PURE = ["toolkit/recipe/schema.py", "toolkit/recipe/yaml12.py", *(f"toolkit/memory/{n}" for n in TORCHLESS),
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "toolkit/plan").glob("*.py")))]  # fmt: skip


@pytest.mark.parametrize("name", PURE)
def test_the_core_is_pure(name: str) -> None:
    """No environment, clock, network or processes in recipe/schema, plan/ and the closed form."""
    roots = {module.split(".")[0] for module in imports_of(ROOT / name)}
    assert not roots & {
        "os",
        "time",
        "datetime",
        "random",
        "subprocess",
        "socket",
        "urllib",
        "requests",
    }
    source = (ROOT / name).read_text()
    assert "environ" not in source


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "toolkit/recipe",
            ("toolkit.plan", "toolkit.train", "toolkit.runs", "toolkit.cli", "launchers"),
        ),
        (
            "toolkit/plan",
            ("toolkit.train", "toolkit.runs", "toolkit.cli", "toolkit.data", "launchers"),
        ),
        ("toolkit/train", ("toolkit.runs", "toolkit.cli", "launchers", "toolkit.recipe.load")),
        ("toolkit/runs", ("toolkit.train", "toolkit.cli")),
        (
            "toolkit/checkpoint",
            ("toolkit.train", "toolkit.runs", "toolkit.cli", "toolkit.data", "launchers"),
        ),
        ("toolkit/data", ("toolkit.train", "toolkit.runs", "toolkit.cli", "launchers")),
        ("launchers", ("toolkit.train", "toolkit.runs", "toolkit.cli", "toolkit.recipe.load")),
    ],
)
def test_layers_look_down_only(folder: str, forbidden: tuple[str, ...]) -> None:
    """An upper layer is never imported from a lower one; workers read plans, never recipes' files."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        bad = [name for name in imports_of(path) if name.startswith(forbidden)]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


TRACING = {"toolkit/memory/trace.py", "toolkit/memory/kernels.py"}


def test_torch_is_imported_in_train_only() -> None:
    """Outside toolkit/train and the two that trace no module imports torch, not even in a function."""
    for path in sorted([*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]):
        name = path.relative_to(ROOT)
        if "train" not in name.parts and str(name) not in TRACING:
            assert not {n.split(".")[0] for n in imports_of(path)} & {
                "torch",
                "accelerate",
                "deepspeed",
            }, path


def test_nothing_unsafe_is_called() -> None:
    """No pickle, no shell, no eval, no remote code, no unsafe YAML anywhere in the product."""
    for path in sorted([*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system", "torch.load", "torch.save"}, (
                    path,
                    name,
                )
                assert not name.startswith(("pickle.", "marshal.")), (path, name)
                for keyword in node.keywords:
                    assert not (keyword.arg == "shell" and ast.unparse(keyword.value) == "True"), (
                        path
                    )
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", path
                    if keyword.arg == "use_safetensors":
                        assert ast.unparse(keyword.value) == "True", path


def test_the_product_does_not_need_shared_notes() -> None:
    """No file of the product points outside the repository."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml"} and name != "tests/test_layers.py":
            assert "../shared" not in path.read_text(), name
