"""`drumline plan --best`: the fastest splits that fit, by brute force, and the command that it prints."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from advice import command, heard, worked
from drumline.plan.advise import with_change
from drumline.plan.fastest import _changes, candidates, search
from drumline.plan.model import Plan, SiteFacts
from drumline.plan.resolve import resolve, shape_of
from drumline.plan.step_time import gpu_seconds
from drumline.plan.sweep import sweep
from drumline.recipe.load import load_recipe
from drumline.session.planning import make_plan, world_of

RECIPE = "llama-8b-8xh100"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("gpus", [8, 64])
def test_no_other_split_that_fits_is_faster(gpus: int) -> None:
    """Every change is planned here and compared; each that was found trains the same."""
    plan = make_plan(load_recipe(RECIPE), gpus)
    world = world_of(plan)
    shape = shape_of(plan.recipe, world)
    assert not isinstance(shape, str)
    found = search(plan, world, count=5)
    assert found
    assert len(found.found) == 5
    kept = [change for _, change in candidates(plan, shape)]
    fitting, of_all = [], []
    for change in _changes(plan, shape):
        other = resolve(with_change(plan.recipe, change), world, is_candidate=True)
        if other.memory.verdict == "fits":
            of_all.append(gpu_seconds(other, shape))
            fitting += of_all[-1:] if change in kept else []
    mine = [gpu_seconds(other, shape) for _, other in found.found]
    assert mine == pytest.approx(sorted(fitting)[:5])
    assert mine[0] == pytest.approx(min(of_all), rel=2e-3)
    for change, _ in found.found:
        same = resolve(with_change(plan.recipe, change), world)
        assert same.training_sha256 == plan.training_sha256
        assert same.batch.effective == plan.batch.effective
    assert len(found.found) + len(found.lost) + found.slower == len(kept)
    assert all("fit" in one.why or ":" in one.why for one in found.lost)


def pasted(out: str) -> Plan:
    """The plan of the overrides that the last line names."""
    words = shlex.split(out.strip().splitlines()[-1].partition("drumline run ")[2])
    return make_plan(load_recipe(words[0], words[1:]))


def test_the_pick_is_pasted() -> None:
    """The overrides make the plan of the first row; with several numbers of GPUs that is the fastest of all."""
    out = worked("plan", RECIPE, "--best").out
    first = next(line.split() for line in out.splitlines() if line.split()[:1] == ["8"])
    plan = pasted(out)
    assert plan.time
    assert float(first[1]) == pytest.approx(plan.time.step_s.expected, rel=0.01)
    assert plan.memory.verdict == "fits"
    assert "faster, but lost:" in out
    assert "does not fit: up to" in out
    many = worked("plan", RECIPE, "--best", "--gpus", "8,16,64", "--gpu", "h200").out
    plan = pasted(many)
    assert (plan.batch.gpus, plan.recipe.cluster.gpu, plan.batch.nodes) == (64, "h200", 8)
    assert [line.split()[0] for line in many.splitlines()[3:6]] == ["8", "16", "64"]


def test_what_it_costs() -> None:
    """GPU-hours at the price that the site states, in the table, in the plan and in JSON."""
    Path("site.yaml").write_text("site: ours\ngpu_hour_price: 2.5\n")
    found: dict[str, Any] = json.loads(
        worked("plan", RECIPE, "--best", "--json", "--site", "site.yaml").out
    )
    best = found["best"][0]["found"][0]
    assert best["cost"] == pytest.approx(2.5 * best["time"]["gpu_hours"])
    assert any(word.startswith("batch.per_device=") for word in best["overrides"])
    table = worked("plan", RECIPE, "--best", "--site", "site.yaml").out
    assert f"{best['cost']:,.0f}" in table
    plain = json.loads(worked("plan", RECIPE, "--json", "--site", "site.yaml").out)["time"]
    assert plain["cost"] == pytest.approx(2.5 * plain["gpu_hours"])
    assert f"{plain['cost']:,.0f} at the site's price" in worked("plan", RECIPE, "--site", "site.yaml").out.replace("\n             ", " ")  # fmt: skip


def test_a_plan_for_a_site() -> None:
    """Its GPU where the recipe states none, its measured links; another GPU is refused."""
    Path("site.yaml").write_text(
        "site: ours\ngpu_hour_price: 2\nbandwidths: {within: 4, copy: 10}\n"
    )
    slow = json.loads(worked("plan", RECIPE, "--json", "--site", "site.yaml").out)
    usual = json.loads(worked("plan", RECIPE, "--json").out)
    assert slow["time"]["step_s"]["expected"] > 1.5 * usual["time"]["step_s"]["expected"]
    assert slow["site"] == {"gpu_hour_price": 2, "within": 4, "between": None, "copy": 10}
    Path("other.yaml").write_text("site: other\ngpu: b200\n")
    told = command("plan", RECIPE, "--site", "other.yaml")
    assert told.code == 2
    assert "the recipe says h100-80gb, site other has b200" in told.err


def test_what_cannot_be_searched_is_told() -> None:
    done = command("plan", "tiny-code-lm", "--best")
    assert done.code == 2
    heard(". Nearest: a cluster.gpu of the table, a model by name", done.err)
    heard("or several with commas. Nearest: --gpus 8", command("plan", RECIPE, "--gpus", "x").err)
    heard("several go with --best. Nearest: --best --gpus 8,16", command("plan", RECIPE, "--gpus", "8,16").err)  # fmt: skip
    worked("plan", RECIPE, "--best", "--gpus", "8,16")
    for other in ("--fix", "--trace", "--sweep", "--html"):
        told = command("plan", RECIPE, "--best", other)
        assert told.code == 2
        heard("--sweep and --html. Nearest: --best alone", told.err)
    Path("site.yaml").write_text("site: ours\n")
    assert "has no gpu_hour_price" in worked("plan", RECIPE, "--site", "site.yaml").err
    nothing = command("plan", RECIPE, "--best", "--gpus", "1", "--gpu", "t4", "precision=fp16")
    assert nothing.code == 3
    assert "nothing that is known fits" in nothing.out


def test_a_number_of_gpus_that_divides_nothing_is_left_out() -> None:
    done = worked("plan", RECIPE, "--best", "--gpus", "7,8")
    assert [line.split()[0] for line in done.out.splitlines()[3:4]] == ["8"]
    assert "left out: 7 GPUs: batch: 7 gpus" in done.err
    assert command("plan", RECIPE, "--best", "--gpus", "7,9").code == 2


def test_a_large_search_plans_few_of_its_candidates() -> None:
    """The order of candidates needs no plans: those that are planned are counted, not timed."""
    plan = make_plan(load_recipe(RECIPE), 64)
    found = search(plan, world_of(plan), count=1)
    assert found
    assert found.slower >= 2 * (len(found.found) + len(found.lost))


def test_a_slow_network_is_gathered_over_less_often() -> None:
    """Between nodes of 12 GB/s the pick keeps gathered weights, or reduces once; no change that does is free."""
    site = SiteFacts(within=360.0, between=12.0)
    plan = make_plan(load_recipe(RECIPE), 64, site=site)
    found = search(plan, world_of(plan), count=1)
    assert found
    (change, pick), *_ = found.found
    assert change["strategy"]["reshard"] != "forward" or change["strategy"]["reduce"] == "step"
    plain = {
        **change,
        "strategy": {**change["strategy"], "reshard": "forward", "reduce": "micro_batch"},
    }
    other = resolve(with_change(plan.recipe, plain), world_of(plan))
    assert pick.time and other.time and pick.memory.device and other.memory.device
    assert pick.time.step_s.expected < 0.9 * other.time.step_s.expected
    assert pick.memory.device.high > other.memory.device.high


def test_no_cell_of_a_sweep_keeps_what_its_strategy_has_not() -> None:
    """Of a recipe that reduces once: cells of FSDP2 do, and cells of DDP need what they need without it."""
    own = [
        "strategy.reshard=step",
        "strategy.reduce=step",
        "batch.effective=64",
        "batch.accumulation=4",
        "model.config.num_hidden_layers=4",
    ]
    plan = make_plan(load_recipe(RECIPE, own))
    cells = sweep(plan, world_of(plan))
    assert {cell.strategy for cell in cells} == {"ddp", "fsdp"}
    plain = make_plan(load_recipe(RECIPE, own[2:]))
    usual = {
        (c.per_device, c.gpus, c.strategy, c.checkpointing): c
        for c in sweep(plain, world_of(plain))
    }
    for cell in cells:
        strategy = with_change(plan.recipe, cell.change).strategy
        assert (strategy.reshard, strategy.reduce) == (
            ("step", "step") if cell.strategy == "fsdp" else ("forward", "micro_batch")
        )
        if cell.strategy == "ddp":
            same = usual[cell.per_device, cell.gpus, cell.strategy, cell.checkpointing]
            assert cell.device_high == same.device_high
