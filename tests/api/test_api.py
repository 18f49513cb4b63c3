"""`import drumline`: plans, memory and errors as Python values; runs are in the notebooks (test_notebooks.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

import drumline
from conftest import ROOT, SOURCES, tiny_recipe
from drumline.errors import DoesNotFit, DrumlineError, PlanError, RecipeError, RunFolderError
from drumline.recipe import yaml12
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan
from drumline.session.show import plan_table


def test_a_plan_is_that_of_the_command() -> None:
    """Also after its package was imported, and for texts, mappings and re-splits."""
    import drumline.plan.model  # binds the package to the name that is called

    found = drumline.plan("llama-8b-8xh100")
    assert str(found) == plan_table(make_plan(load_recipe("llama-8b-8xh100")))
    assert repr(found) == "<plan of llama-8b-8xh100: 256 = 2 × 8 × 16, fits>"
    change = {"batch.per_device": 4, "batch.accumulation": None}
    assert drumline.plan("llama-8b-8xh100", change) == drumline.plan(
        "llama-8b-8xh100", ["batch.per_device=4", "batch.accumulation=null"]
    )
    assert drumline.plan("llama-8b-8xh100", gpus=32, gpu="h200").batch.gpus == 32
    assert (
        drumline.estimate_memory("llama-8b-8xh100", change)
        == drumline.plan("llama-8b-8xh100", change).memory
    )


def test_a_recipe_of_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file with them in the current folder would be read, `extends` and relative paths too."""
    monkeypatch.chdir(tmp_path)
    plain = tiny_recipe()
    Path("r.yaml").write_text(yaml12.dump(plain))
    assert (
        drumline.plan(plain)
        == drumline.plan("r.yaml")
        == drumline.plan(Path("r.yaml"))
        == drumline.plan(load_recipe("r.yaml"))
    )
    files = {
        **plain,
        "data": {
            "source": "files",
            "path": "rows/*.jsonl",
            "task": "classification",
            "samples": 100,
        },
    }
    assert drumline.plan(files).recipe.data.path == str(tmp_path / "rows/*.jsonl")
    assert (
        drumline.plan({"recipe": "mine", "extends": "llama-8b-8xh100", "seed": 3}).recipe.seed == 3
    )
    del plain["project"]
    Path("example_models.py").write_text((ROOT / "recipes/example_models.py").read_text())
    assert drumline.plan(plain).recipe.project == str(tmp_path)


def test_errors_are_those_of_the_product(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch\.per_devise: unknown key"):
        drumline.plan("llama-8b-8xh100", {"batch.per_devise": 4})
    with pytest.raises(PlanError, match="cannot make effective 256"):
        drumline.plan("llama-8b-8xh100", {"batch.per_device": 3, "batch.accumulation": None})
    misfit = drumline.plan("llama-1b-8xh100", {"batch.per_device": 32, "batch.accumulation": 2})
    assert misfit.memory.fits is False
    with pytest.raises(RunFolderError):
        drumline.load_run(tmp_path)
    assert drumline.errors.RecipeError is RecipeError
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        drumline.plam  # noqa: B018


def test_what_cannot_start_raises_with_the_command_s_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the class of its exit code; no folder is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    card = {"name": "small", "memory_gib": 0.0001, "bf16_tflops": 1}
    llama = {
        "source": "config",
        "factory": None,
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 300,
        },
    }
    text = {
        "source": "builtin",
        "name": "python-stdlib",
        "task": "causal_lm",
        "sequence_length": 64,
        "samples": 100,
        "validation": 0.0,
    }
    recipe = tiny_recipe(
        model=llama, data=text, cluster={"gpu": card}, batch={"weighting": "token"}
    )
    with pytest.raises(DoesNotFit, match="per rank expected"):
        drumline.run(recipe, run_dir="r", quiet=True)
    with pytest.raises(DrumlineError, match="none: does not exist") as error:
        drumline.reproduce(tmp_path / "none", quiet=True)
    assert "Traceback" not in str(error.value)
    assert not Path("r").exists()


def test_importing_it_is_light() -> None:
    """Nothing of the interface, pydantic or torch is loaded before it is used; its names are listed."""
    program = "import sys, drumline; print(sorted(sys.modules)); print(dir(drumline))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        check=True,
    )
    modules, names = (eval(line) for line in done.stdout.splitlines())
    assert not {"drumline.api", "pydantic", "torch", "pandas", "numpy"} & set(modules)
    assert {"plan", "run", "load_run", "estimate_memory", "reproduce"} <= set(names)


def test_the_names_are_typed(tmp_path: Path) -> None:
    """mypy knows what a user's script gets from them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import drumline\n"
        "plan = drumline.plan('llama-8b-8xh100', {'batch.per_device': 4}, gpus=8)\n"
        "reveal_type(plan.batch.effective)\n"
        "reveal_type(drumline.load_run('r').checkpoints)\n"
        "drumline.plan(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", "--config-file=", str(script)],
        env={"MYPYPATH": SOURCES, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert 'Revealed type is "int"' in done.stdout, done.stdout + done.stderr
    assert "Checkpoint]" in done.stdout
    assert done.stdout.count("error:") == 1, done.stdout
