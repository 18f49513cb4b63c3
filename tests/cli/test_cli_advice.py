"""What commands refuse with a "Nearest" is done when that is followed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from advice import LM, change_record, command_in, heard, here, programs, refused, worked
from conftest import tiny_recipe
from drumline.recipe import yaml12

__all__ = ["here", "programs"]

SHORT = ["duration.steps=2", "schedule.warmup_steps=0"]


def test_cache_rm_takes_what_it_names(here: Path) -> None:
    """A KEY of `drumline cache`, an age, or all of it."""
    worked("prepare", str(here / "project/lm.yaml"))
    (key,) = (line.split()[0] for line in worked("cache").out.splitlines()[:-1])
    heard("cache rm: nothing is named", refused("cache", "rm"))
    worked("cache", "rm", "--older-than", "30")
    heard("Nearest: a KEY of `drumline cache`", refused("cache", "rm", "nokey"))
    assert "removed 1 " in worked("cache", "rm", key).out
    worked("cache", "rm", "--all")


def test_export_does_what_it_names(here: Path, programs: Path) -> None:
    """Another folder; the data prepared again; without --best; a site with --to slurm or not at all."""
    told = heard("the prepared data are gone", refused("export", str(here / LM), "model"))
    worked(*command_in(told))
    worked("export", LM, "model")
    heard("is not an empty folder. Nearest: another folder", refused("export", LM, "model"))
    worked("export", LM, "another")
    heard("no saved step has been evaluated", refused("export", LM, "best", "--best"))
    worked("export", LM, "best")
    (here / "s.yaml").write_text("site: x\n")
    site = ["--site", "s.yaml"]
    told = refused("export", LM, "out", *site)
    heard("--site: an export here uses none", told)
    assert worked("export", LM, "out", *site, "--to", "slurm").out == "job 17\n"
    worked("export", LM, "out")


def test_cancel_names_a_command_that_answers(here: Path) -> None:
    """A run and a sweep in which nothing runs: `status` tells how they ended."""
    told = heard("nothing runs", refused("cancel", str(here / LM)))
    assert worked(*command_in(told)).out.startswith("finished")
    (here / "all runs").mkdir()
    shutil.copytree(here / LM, here / "all runs/000")
    (here / "all runs/sweep.json").write_text('{"000": []}')
    told = heard("nothing runs", refused("cancel", str(here / "all runs")))
    assert "000  finished" in worked(*command_in(told)).out


def test_a_finished_run_is_given_more_steps_by_another_run(here: Path, forked: Any) -> None:
    """The command that it names goes on to the N steps, also where the folder's name has a space.

    The run was made by an earlier version, whose checkpoints do not tell the place in the data.
    """
    told = heard("it cannot be given more steps", refused("resume", str(here / LM)))
    done = forked(*command_in(told, N="14"), "--run-dir", "more")
    assert done.returncode == 0, done.stderr
    assert "step 14/14" in worked("status", str(here.parent / "more")).out
    assert "(steps 13 to 14)" in done.stderr


def test_a_run_that_never_started_is_started(here: Path, forked: Any) -> None:
    """The plan of a run that has no attempt: the command that is named trains it."""
    change_record(here / LM, attempts=[], outcome=None)
    told = heard("this run never started. Nearest: `drumline run", refused("export", LM, "model"))
    done = forked(*command_in(told), *SHORT, "--run-dir", "started")
    assert done.returncode == 0, done.stderr


def test_resume_names_where_an_option_belongs(here: Path, programs: Path) -> None:
    """A job's option with --to slurm, or without it."""
    change_record(here / "stopped-lm", jobs=[])
    heard("a resume here uses none", refused("resume", "stopped-lm", "--time", "5"))
    assert "job 17" in worked("resume", "stopped-lm", "--time", "5", "--to", "slurm").out


def test_what_reproduce_refuses_is_reached_as_it_says(
    here: Path, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trust, no --code, `drumline run` and `compare` for another training, --changed-data."""
    mlp, lm = str(here / "finished-mlp"), str(here / LM)
    heard("the record names code to run", refused("reproduce", mlp))
    heard("holds no code", refused("reproduce", lm, "--code", "--trust-code"))
    done = forked("reproduce", mlp, "--trust-code", "--steps", "2", "--run-dir", "first")
    assert done.returncode == 0, done.stderr
    heard("would make it another training", refused("reproduce", lm, "seed=8"))
    done = forked("run", lm, "seed=8", *SHORT, "--run-dir", "other")
    assert done.returncode == 0, done.stderr
    done = forked("compare", lm, "other")
    assert done.returncode == 5
    assert "seed 7 became 8" in done.stdout
    (here / "project/corpus.txt").write_text("other words\n" * 400)
    heard("the data have changed", forked("reproduce", lm, "--steps", "2").stderr)
    done = forked("reproduce", lm, "--steps", "2", "--changed-data")
    assert done.returncode == 5, done.stderr
    record = json.loads((here / LM / "record.json").read_text())
    change_record(here / LM, recipe={**record["recipe"], "seed": 8})
    told = refused("reproduce", lm)
    heard("its recipe has been changed since it ran", told)
    assert forked("run", lm, *SHORT, "--run-dir", "another").returncode == 0


def test_a_recipe_file_that_says_no_outcome_says_it_after_a_run(here: Path, forked: Any) -> None:
    """`drumline run` of that file; the new run's recipe.yaml can be compared."""
    shutil.copy("project/lm.yaml", "project/my recipe.yaml")
    mine = str(here / "project/my recipe.yaml")
    told = heard("it does not say what came out", refused("compare", LM, mine))
    done = forked(*command_in(told), *SHORT, "--run-dir", "it")
    assert done.returncode == 0, done.stderr
    kept = here.parent / "it/recipe.yaml"
    assert worked("compare", str(kept), str(kept)).out


def test_a_sweep_is_made_as_it_says(here: Path, programs: Path) -> None:
    """--at-most with Slurm; fewer values; one size of job; the option of a factory's project."""
    recipe, values = "project/lm.yaml", ["optimizer.lr=1e-3,2e-3"]
    heard("a local sweep runs one at a time", refused("sweep", recipe, *values, "--at-most", "1"))
    worked("sweep", recipe, *values, "--at-most", "1", "--to", "slurm", "--folder", "s")
    many = [f"{key}={','.join(map(str, range(1, 40)))}" for key in ("seed", "optimizer.lr")]
    heard("Nearest: fewer values", refused("sweep", recipe, *many, "--dry-run"))
    worked("sweep", recipe, *values, "--dry-run")
    sizes = ["batch.gpus=1,2", "batch.accumulation=null", "--dry-run"]
    heard("an array has one size", refused("sweep", recipe, *sizes, "--to", "slurm"))
    worked("sweep", recipe, *sizes)
    worked("sweep", recipe, "batch.gpus=2", "batch.accumulation=null", "--dry-run", "--to", "slurm")


def test_verify_without_layers(here: Path, forked: Any) -> None:
    """A factory's model is verified whole."""
    (here / "r.yaml").write_text(yaml12.dump(tiny_recipe()))
    heard("a factory's model has no known layers", refused("verify", "r.yaml", "--layers", "1"))
    done = forked("verify", str(here / "r.yaml"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "trusting"),
    [
        (("run", "finished-mlp", *SHORT, "--run-dir", "new"), True),
        (("prepare", "finished-mlp"), False),
        (("plan", "finished-mlp", "--trace"), False),
        (("verify", "finished-mlp"), True),
        (("sweep", "finished-mlp", "optimizer.lr=1e-3", *SHORT, "--folder", "new"), True),
        (("submit", "finished-mlp"), False),
        (("resume", "finished-mlp"), True),
        (("attend", "finished-mlp", "--nodes", "1"), True),
    ],
    ids=lambda value: str(value)[:18],
)
def test_what_a_record_s_code_is_refused_for_is_done_with_the_option(
    here: Path, forked: Any, programs: Path, words: tuple[str, ...], trusting: bool
) -> None:
    """Each command that says "read it, then --trust-code" has that option, and then gets on with its work."""
    if words[0] in ("resume", "attend"):
        change_record(here / "finished-mlp", outcome="stopped")
    worked("prepare", "finished-mlp", "--trust-code")
    told = refused(*words)
    heard("read it, then --trust-code", told)
    heard("and this user has not trained that", told)
    if trusting:
        places = [str(here / w) if w == "finished-mlp" else w for w in words]
        done = forked(*places, "--trust-code")
        assert done.returncode == 0, done.stderr
    else:
        worked(*words, "--trust-code")
