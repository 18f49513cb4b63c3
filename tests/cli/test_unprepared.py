"""Recipes whose data are not prepared: what is known is shown, and the advice, followed, makes the rest known."""

import json
from pathlib import Path

import pytest

from advice import Done, command, command_in, heard, worked

RECIPE = """
recipe: mine
schema: 1
model:
  source: config
  architecture: gpt2
  config: {vocab_size: 257, n_positions: 16, n_embd: 8, n_layer: 1, n_head: 1}
data: {source: files, path: rows.jsonl, task: causal_lm, sequence_length: 16}
batch: {per_device: 2, gpus: 1, accumulation: 1}
optimizer: {name: adamw, lr: 0.001}
duration: {epochs: 2}
cluster: {gpu: cpu}
"""
NOT_YET = "is unknown until the data are prepared. Nearest: run `drumline prepare mine.yaml"


@pytest.fixture(autouse=True)
def _recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / "cache"))
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"text": "abc" * n}) + "\n" for n in range(1, 40))
    )
    Path("mine.yaml").write_text(RECIPE)


def test_a_plan_shows_what_it_can_and_how_to_know_the_rest() -> None:
    """The command of the advice, run as it is printed, makes the same plan succeed."""
    done = command("plan", "mine.yaml", "optimizer.lr=0.01")
    assert done.code == 2
    assert "As if an epoch had 1,000,000 samples" in done.out
    assert "peak 0.01" in done.out
    heard(NOT_YET, done.err)
    for form in ("--json", "--sweep", "--html"):
        assert command("plan", "mine.yaml", form).out == ""
    worked(*command_in(done.err))
    known = worked("plan", "mine.yaml", "optimizer.lr=0.01")
    assert "As if" not in known.out
    assert not list(Path().glob("*.html"))


def test_an_impossible_equation_comes_first() -> None:
    done = command("plan", "mine.yaml", "batch.effective=1001")
    assert (done.code, done.out) == (2, "")
    assert "not effective 1001" in done.err


@pytest.mark.parametrize("verb", [("run",), ("submit", "--to", "slurm")], ids=["run", "submit"])
def test_a_dry_run_tells_what_is_missing(verb: tuple[str, ...]) -> None:
    """What stdout holds is the script alone; the files that are missing are named, and the command of the advice helps."""

    def dry(*words: str) -> Done:
        return command(verb[0], "mine.yaml", *verb[1:], "--dry-run", *words)

    unknown = dry()
    assert (unknown.code, unknown.out) == (2, "")
    heard(NOT_YET, unknown.err)
    by_steps = ("duration.steps=3", "duration.epochs=null")
    warned = dry(*by_steps)
    assert warned.code == 0
    assert "warning: the data are not prepared" in warned.err
    assert "`drumline prepare mine.yaml duration.steps=3 duration.epochs=null`" in warned.err
    Path("rows.jsonl").rename("elsewhere")
    assert "rows.jsonl does not exist" in dry(*by_steps).err
    Path("elsewhere").rename("rows.jsonl")
    worked("prepare", "mine.yaml", *by_steps)
    assert "prepare" not in dry(*by_steps).err


def test_a_plan_as_if_is_for_the_site_as_well() -> None:
    """The site's GPU where the recipe states none, and its price."""
    Path("mine.yaml").write_text(RECIPE.replace("cluster: {gpu: cpu}\n", ""))
    Path("site.yaml").write_text("site: ours\ngpu: l4\ngpu_hour_price: 2\n")
    done = command("plan", "mine.yaml", "--site", "site.yaml")
    assert done.code == 2
    assert "(l4, " in done.out
    assert "at the site's price" in done.out.replace("\n             ", " ")
