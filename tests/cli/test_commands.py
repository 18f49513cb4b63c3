"""The real command, as a new user types it: output, messages and exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from advice import heard
from conftest import ROOT, SOURCES, tiny_recipe
from drumline.errors import RecipeError
from drumline.recipe import catalogue, yaml12

SMALL = ["data.name=synthetic-classification"]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml12.dump(tiny_recipe()))
    return path


def test_plan_shows_the_equation_and_says_when_it_does_not_fit(drumline: Any) -> None:
    """Exit 0 with the table; exit 3 with advice when it does not fit."""
    done = drumline("plan", "llama-8b-8xh100")
    assert done.returncode == 0, done.stderr
    assert "256 = 2 per_device × 8 gpus × 16 accumulation" in done.stdout
    assert "20,000 optimizer steps" in done.stdout
    full = drumline("plan", "llama-8b-8xh100", "batch.per_device=32", "batch.accumulation=1",
                    "model.activation_checkpointing=none")  # fmt: skip
    assert full.returncode == 3
    assert "DOES NOT FIT" in full.stdout
    assert "advice" in full.stdout


def test_plan_json_is_one_object_that_the_published_schema_accepts(drumline: Any) -> None:
    """`--json` prints the plan also when the code is 3; `schema --plan` is its schema."""
    schema = json.loads(drumline("schema", "--plan").stdout)
    for arguments, code in ([["worked-example"], 0], [["llama-1b-8xh100", "batch.per_device=64", "batch.accumulation=1"], 3]):  # fmt: skip
        done = drumline("plan", *arguments, "--json")
        assert done.returncode == code
        plan = json.loads(done.stdout)
        jsonschema.validate(plan, schema)
        assert plan["batch"]["effective"] in (32, 512)


def test_the_recipe_schema_accepts_the_shipped_recipes(drumline: Any) -> None:
    """`drumline schema` is what an editor needs; it refuses unknown keys."""
    schema = json.loads(drumline("schema").stdout)
    for name in catalogue.names():
        raw = yaml12.parse((catalogue.folder() / f"{name}.yaml").read_text())
        if "extends" not in raw:
            jsonschema.validate(raw, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tiny_recipe(), "optimzer": 1}, schema)


def test_gpus_resplits(drumline: Any) -> None:
    """--gpus 16: the same effective batch on two nodes."""
    done = drumline("plan", "llama-8b-8xh100", "--gpus", "16")
    assert "256 = 2 per_device × 16 gpus × 8 accumulation" in done.stdout
    assert "2 nodes" in done.stdout
    bad = drumline("plan", "llama-8b-8xh100", "--gpus", "24")
    assert bad.returncode == 2
    assert "24 gpus" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{r}", "optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key"),
        (["plan", "{r}", "batch.per_device=5"], "5 per_device × 2 gpus × k cannot make effective 12"),
        (["plan", "nothing.yaml"], "nothing.yaml: no such file or shipped recipe"),
        (["plan", "{d}"], "a folder, not a recipe"),
        (["plan", "{empty}"], "is empty; a recipe is a mapping"),
        (["run", "{r}", "--run-dir", "{full}"], "is not an empty folder. Nearest: another --run-dir"),
        (["run", "{r}", "--run-dir", "{run}"], "holds a run. Nearest: `drumline resume"),
        (["run", "{r}", "data.path=/none.txt", "data.source=files", "data.name=null", "data.samples=null"],
         "/none.txt does not exist"),
        (["run", "{r}", "--dry-run", "--rendezvous", "host"], "--rendezvous host: expected HOST:PORT"),
        (["run", "{r}", "--dry-run", "--node-rank", "1"], "--node-rank 1: the plan has 1 nodes, counted from 0"),
        (["run", "{r}", "--node-rank", "0"], "--node-rank and --rendezvous go with --dry-run"),
        (["run", "{r}", "--run-dir", "{r}/x"], "r.yaml is a file, not a folder"),
        (["resume", "{full}"], "is not a run folder (no record.json)"),
        (["resume", "{d}/none"], "does not exist"),
        (["resume", "{run}/checkpoints/step-00000010"], "is a checkpoint. Nearest: "),
        (["recipes", "show", "tiny-code"], "Did you mean the shipped recipe 'tiny-code-lm'"),
        (["recipes", "copy", "eighty", "{r}"], "exists and would be overwritten"),
        (["doctor", "llama-8b-8xh100"], "cannot run here: it wants 8 × h100-80gb on a node"),
        (["prepare", "{r}", "data.options={{rows: x}}"], "data.options"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_message_and_exit_2(
    drumline: Any, recipe_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Path, value, nearest fix; no traceback; nothing left behind."""
    (tmp_path / "empty.yaml").touch()
    full, run = tmp_path / "full", tmp_path / "run"
    full.mkdir()
    (full / "x").touch()
    (run / "checkpoints/step-00000010").mkdir(parents=True)
    (run / "checkpoints/step-00000010/manifest.json").touch()
    (run / "record.json").touch()
    names = {
        "r": recipe_file,
        "d": tmp_path / "full",
        "empty": tmp_path / "empty.yaml",
        "full": full,
        "run": run,
    }
    before = sorted(tmp_path.rglob("*"))
    done = drumline(*[argument.format(**names) for argument in arguments])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(drumline: Any) -> None:
    """Only --debug does."""
    assert "Traceback" in drumline("--debug", "plan", "nothing.yaml").stderr


def test_recipes_can_be_listed_shown_and_copied(drumline: Any, tmp_path: Path) -> None:
    """A copy, with the files it needs beside it, plans by itself."""
    listed = drumline("recipes", "ls").stdout
    assert [line.split()[0] for line in listed.splitlines()] == catalogue.names()
    assert re.search(r"eighty\s+80 = 4 per_device × 5 gpus × 4 accumulation", listed)
    shown = drumline("recipes", "show", "eighty").stdout
    assert shown == (ROOT / "recipes/eighty.yaml").read_text()
    assert drumline("recipes", "copy", "eighty", "mine.yaml").returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "mine.yaml",
        "worked-example.yaml",
        "recipe.schema.json",
        "example_models.py",
    }
    assert drumline("plan", "mine.yaml").returncode == 0


def test_a_dry_run_prints_what_would_start(
    drumline: Any, recipe_file: Path, tmp_path: Path
) -> None:
    """Ready to paste, and nothing is made."""
    before = sorted(tmp_path.rglob("*"))
    done = drumline("run", str(recipe_file), "--dry-run")
    assert done.returncode == 0
    assert "torch.distributed.run" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_doctor_tells_what_is_here(drumline: Any) -> None:
    """Versions, cores, GPUs, launchers."""
    done = drumline("doctor", "tiny-code-lm")
    assert done.returncode == 0, done.stderr
    for word in (
        "python",
        "cores",
        "gpus",
        "torch",
        "launchers    torchrun",
        "tiny-code-lm can run here",
    ):
        assert word in done.stdout


def test_a_recipe_that_does_not_fit_is_not_started(drumline: Any, tmp_path: Path) -> None:
    """Exit 3, before anything is made."""
    done = drumline("run", "llama-1b-8xh100", "batch.per_device=64", "batch.accumulation=1")
    assert done.returncode == 3
    assert "`drumline plan` lists what makes it fit" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_launcher_that_is_not_installed_is_one_line(recipe_file: Path, launcher: str) -> None:
    """Which extra to install, exit 2; planning the same recipe works."""
    program = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == '{launcher}' else real(name, *rest)\n"
        f"sys.argv = ['drumline', *sys.argv[1:], {str(recipe_file)!r}, 'launch.launcher={launcher}']\n"
        "from drumline.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": SOURCES}
    for command, code in (("plan", 0), ("run --dry-run", 0), ("run", 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *command.split()],
            env=env, cwd=recipe_file.parent, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code:
            assert (
                f"{launcher} is not installed. Nearest: pip install 'drumline[{launcher}]'"
                in done.stderr
            )
            assert len(done.stderr.splitlines()) == 1


def test_sweep_combines_and_plans_all_before_the_first(drumline: Any, tmp_path: Path) -> None:
    """Commas in brackets do not separate; a bad value in any combination is exit 2, and nothing is made."""
    from drumline.cli.sweep import combine

    assert combine(["a.b=1,[2,3],{c: 4, d: 5}", "e=x"]) == [
        ["a.b=1", "e=x"],
        ["a.b=[2,3]", "e=x"],
        ["a.b={c: 4, d: 5}", "e=x"],
    ]
    with pytest.raises(RecipeError, match="40 × 40 = 1,600 runs, over 1,000"):
        combine([f"a={','.join(map(str, range(40)))}", f"b={','.join(map(str, range(40)))}"])
    done = drumline("sweep", "tiny-code-lm", "optimizer.lr=1e-3,oops", "--folder", "s")
    assert done.returncode == 2
    assert "optimizer.lr" in done.stderr
    assert not (tmp_path / "s").exists()


def test_sweep_trains_each_and_reports_all(forked: Any, tmp_path: Path) -> None:
    """Two runs here, one after the other, in one folder with one page."""
    values = [
        "optimizer.lr=1e-3,2e-3",
        "duration.epochs=null",
        "duration.steps=3",
        "evaluation=null",
        "early_stopping=null",
    ]
    done = forked("sweep", "worked-example", *values, "--folder", "s", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [Path(run).name for run in facts["runs"]] == ["000", "001"]
    rates = [
        json.loads((tmp_path / f"s/{n}/record.json").read_text())["recipe"]["optimizer"]["lr"]
        for n in ("000", "001")
    ]
    assert rates == [1e-3, 2e-3]
    assert "000 and 001" in (tmp_path / "s/report.html").read_text()
    assert len(json.loads(forked("runs", "s", "--json").stdout)["runs"]) == 2


def test_edges_of_a_shell_are_told_as_they_are(drumline: Any, tmp_path: Path) -> None:
    """A rank left over in the environment, a recipe on a pipe, a folder that is gone: one message, no traceback."""
    env = {**os.environ, "PYTHONPATH": SOURCES}

    def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        shell = command.replace("drumline", f"{sys.executable} -P -m drumline.cli")
        return subprocess.run(["bash", "-c", shell], cwd=tmp_path, env={**env, **variables}, capture_output=True,
                              text=True, timeout=60, check=False)  # fmt: skip

    alone = run("drumline run tiny-code-lm --dry-run", NODE_RANK="1", MASTER_ADDR="elsewhere")
    assert alone.returncode == 0, alone.stderr
    assert "unset MASTER_ADDR NODE_RANK" in alone.stdout
    several = ["batch.gpus=64", "batch.accumulation=null"]
    wide = f"drumline run llama-8b-8xh100 {' '.join(several)} --dry-run"
    assert "NODE_RANK in the environment 9: the plan has 8 nodes" in run(wide, NODE_RANK="9").stderr
    piped = run("cat /dev/null | drumline plan /dev/stdin")
    assert piped.returncode == 2
    assert "Traceback" not in piped.stderr
    lost = run("mkdir gone && cd gone && rmdir ../gone && drumline plan tiny-code-lm")
    assert lost.returncode == 2
    heard("the current folder has been deleted", lost.stderr)
    assert (
        run("mkdir gone && cd gone && rmdir ../gone && cd .. && drumline recipes").returncode == 0
    )
