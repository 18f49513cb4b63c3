"""Data sets, models and losses of a project: the docs' examples at every split, with workers, resumed, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arena import ENGINES, Arena

from advice import heard
from conftest import ROOT
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.data.tasks.map_style import _stacked
from drumline.errors import DrumlineError
from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe, merge, validate
from drumline.session.planning import make_plan, with_trace
from drumline.session.prepare import prepare_data
from drumline.trace.rehearse import rehearse
from drumline.train.batches import MicroBatches, micro_batch_tensors, open_rows

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

EXAMPLES = ROOT / "docs/examples"
SPLITS = [(24, 1, 2), (12, 2, 2), (8, 2, 3)]
RUNS = [
    ("ddp", SPLITS[1]),
    ("ddp", SPLITS[2]),
    ("fsdp", SPLITS[2]),
    ("accelerate", SPLITS[1]),
    ("zero2", SPLITS[1]),
]


def plan_of(name: str, engine: str, split: tuple[int, int, int], **changes: Any) -> Plan:
    b, gpus, k = split
    plain = load_recipe(str(EXAMPLES / f"{name}.yaml")).model_dump(by_alias=True)
    short = {"duration": {"steps": 8}, "schedule": {"warmup_steps": None, "name": "constant"}, "ema": None,
             "batch": {"effective": b * gpus * k, "per_device": b, "gpus": gpus, "accumulation": k},
             "evaluation": {"every_steps": 4, "per_device": 16}, "checkpoint": {"every_steps": 2, "keep_last": 9},
             "logging": {"every_steps": 1}, **ENGINES[engine]}  # fmt: skip
    recipe = validate(merge(merge(plain, short), changes), "r")
    prepare_data(recipe)
    return make_plan(recipe)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("own"))
    for name in ("quantiles", "diffusion"):
        made.ask("train", f"{name}-one", plan_of(name, "ddp", SPLITS[0]))
        for engine, split in RUNS:
            made.ask("train", f"{name}-{engine}-{split}", plan_of(name, engine, split))
        made.ask("train", f"{name}-workers", plan_of(name, "ddp", SPLITS[1], data={"workers": 2}))
        made.ask("train", f"{name}-stopped", plan_of(name, "ddp", SPLITS[1]), stop_after=5)
        made.ask("verify", f"{name}-verify", plan_of(name, "fsdp", SPLITS[1]), fault="")
    for engine, split in (
        ("ddp", (24, 1, 1)),
        ("ddp", (12, 2, 1)),
        ("fsdp", (12, 2, 1)),
        ("zero2", (12, 2, 1)),
        ("ddp", (6, 2, 2)),
    ):
        made.ask("train", f"embeddings-{engine}-{split}", plan_of("embeddings", engine, split))
    made.ask("verify", "embeddings-verify", plan_of("embeddings", "ddp", (12, 2, 1)), fault="")
    made.go()
    for name in ("quantiles", "diffusion"):
        made.ask("train", f"{name}-stopped", plan_of(name, "ddp", SPLITS[1], data={"workers": 3}))
    made.go()
    return made


def near(found: list[dict[str, Any]], wanted: list[dict[str, Any]], within: float = 3e-5) -> bool:
    return len(found) == len(wanted) and all(
        ours == pytest.approx(theirs, rel=within, abs=1e-6)
        for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", ["quantiles", "diffusion"])
def test_a_sum_over_samples_is_one_curve(arena: Arena, name: str) -> None:
    """At every split and under every engine, though samples are drawn anew in each epoch; verification agrees."""
    wanted = arena.curve(f"{name}-one", "below", "found")
    assert len(wanted) == 10
    for engine, split in RUNS:
        # A quantile's loss has a kink at every point, where rounding decides on the side.
        within = 2e-3 if name == "quantiles" else 3e-5
        assert near(arena.curve(f"{name}-{engine}-{split}", "below", "found"), wanted, within), (
            engine,
            split,
        )
    assert arena.verdict(f"{name}-verify") == (True, True)


@pytest.mark.parametrize("name", ["quantiles", "diffusion"])
def test_workers_and_a_resume_change_nothing(arena: Arena, name: str) -> None:
    """Bitwise, with one, two or three workers."""
    wanted = arena.curve(f"{name}-ddp-{SPLITS[1]}", "below", "found")
    assert arena.curve(f"{name}-workers", "below", "found") == wanted
    assert arena.curve(f"{name}-stopped", "below", "found") == wanted


def test_negatives_of_all_ranks(arena: Arena) -> None:
    """Gathered, per_device × gpus alone decides: 24 on one rank or 12 on each of two; accumulated it is another loss."""
    wanted = arena.curve(f"embeddings-ddp-{(24, 1, 1)}", "below", "found")
    for engine in ("ddp", "fsdp", "zero2"):
        found = arena.curve(f"embeddings-{engine}-{(12, 2, 1)}", "below", "found")
        steps = [(a, b) for a, b in zip(found, wanted, strict=True) if "loss" in a]
        assert len(steps) == 8
        assert near([a for a, _ in steps], [b for _, b in steps]), engine
    other = arena.curve(f"embeddings-ddp-{(6, 2, 2)}", "below", "found")
    assert not near(other, wanted, within=1e-2)
    report = json.loads((arena.folder / "embeddings-verify/verify.json").read_text())
    assert arena.verdict("embeddings-verify")[0] is False
    assert "another split has other negatives" in report["why_not_additive"]
    plan = plan_of("embeddings", "ddp", (12, 2, 1))
    assert (plan.split_invariance.level, "drumline verify" in plan.split_invariance.why) == ("unknown", True)  # fmt: skip


def test_its_step_can_be_traced() -> None:
    """With the shapes of the first sample."""
    plan = plan_of("diffusion", "ddp", SPLITS[1])
    assert plan.memory.method == "unknown"
    assert with_trace(plan, rehearse(plan).traced()).memory.fits


MINE = """
import numpy as np
import torch


class Data:
    def __init__(self, size, wrong):
        self.size, self.wrong = size, wrong

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        if self.wrong == "fails" and number == 3:
            raise ValueError("no such file")
        if self.wrong == "kind":
            return [1, 2, 3]
        return torch.tensor([float(number), torch.rand(()).item()]), number % 2


KINDS = {
    "unequal": lambda number: {"x": torch.ones(1 + number)},
    "lacking": lambda number: {"x": torch.ones(1)} | ({"y": torch.ones(1)} if number == 1 else {}),
    "types": lambda number: {"x": torch.ones(1) if number % 2 else torch.ones(1).long()},
    "texts": lambda number: {"x": torch.ones(1), "name": "a"},
    "taken": lambda number: {"x": torch.ones(1), "weights": torch.zeros(())},
    "drawn": lambda number: {"x": np.random.default_rng().random(4)},
    "narrow": lambda number: {"x": torch.ones(2, dtype=torch.bfloat16) / 2},
    "masked": lambda number: {"x": torch.ones(1), "attention_mask": torch.full((3,), 0.5)},
}


class Kind(Data):
    def __getitem__(self, number):
        return KINDS[self.wrong](number)


class Collated(Data):
    def collate(self, samples):
        return {"x": torch.stack([one for one, _ in samples]), "n": len(samples) * torch.ones(len(samples))}


class Odd(Data):
    def collate(self, samples):
        return [samples]


def data(size=6, wrong=""):
    if wrong in KINDS:
        return Kind(size, wrong)
    return {"": Data, "fails": Data, "kind": Data, "collated": Collated, "odd": Odd}[wrong](size, wrong) if wrong != "none" else object()
"""


def section(folder: Path, **options: Any) -> Any:
    (folder / "mine.py").write_text(MINE)
    raw = {"recipe": "r", "schema": 1, "project": str(folder), "model": {"source": "factory", "factory": "mine:data"},
           "data": {"source": "dataset", "factory": "mine:data", "options": options, "task": "custom"},
           "batch": {"effective": 2, "per_device": 2, "gpus": 1}, "optimizer": {"name": "sgd", "lr": 0.1}, "duration": {"steps": 1}}  # fmt: skip
    return validate(raw, "r").data


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wrong": "none"}, "without __len__. Nearest: a torch.utils.data.Dataset with a length"),
        ({"wrong": "kind"}, "not list. Nearest: a method collate(samples) of the data set"),
        ({"wrong": "odd"}, "a batch is a mapping of names to tensors, not list"),
        ({"wrong": "fails"}, "sample 3: ValueError: no such file"),
        ({"wrong": "lacking"}, "sample 1 has x (float32), y (float32), and sample 0 has x (float32). Nearest: the same names and types in all"),
        ({"wrong": "types"}, "sample 1 has x (float32), and sample 0 has x (int64). Nearest"),
        ({"wrong": "texts"}, "'name' holds <U1, and not numbers. Nearest: a tensor"),
        ({"wrong": "taken"}, "samples 0: DataError: data: 'weights' is the name of what each row counts in a batch. Nearest: another name"),
        ({"wrong": "drawn"}, "sample 0 is another one each time that it is read. Nearest: draw from random, numpy.random or torch"),
        ({"unknown": 1}, "do not suit mine:data"),
        ({"size": 0}, "the source has no rows"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_data_set_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """Before anything starts; with a collate of its own the samples may be anything."""
    with pytest.raises(DrumlineError) as caught:
        prepare(section(tmp_path, **options), str(tmp_path))
    told = str(caught.value)
    assert words in (heard(words, told) if "Nearest" in words else told)
    assert prepare(section(tmp_path, wrong="collated"), str(tmp_path)).is_dir()


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(DrumlineError) as caught:
        prepare(section(folder, **options), str(folder))
    return str(caught.value)


def test_advice_on_data_sets_is_followed(tmp_path: Path) -> None:
    """A data set with a length, and one with a collate of its own."""
    heard("Nearest: a torch.utils.data.Dataset with a length", refused(tmp_path, wrong="none"))
    assert prepare(section(tmp_path), str(tmp_path)).is_dir()
    heard("Nearest: a method collate(samples) of the data set", refused(tmp_path, wrong="kind"))
    assert prepare(section(tmp_path, wrong="collated"), str(tmp_path)).is_dir()
    told = refused(tmp_path, wrong="lacking")
    heard("and sample 0 has x (float32). Nearest: the same names and types in all", told)
    heard("and not numbers. Nearest: a tensor", refused(tmp_path, wrong="texts"))
    heard(
        "is the name of what each row counts in a batch. Nearest: another name",
        refused(tmp_path, wrong="taken"),
    )
    told = refused(tmp_path, wrong="drawn")  # `Data` above draws from torch, and is accepted
    heard("Nearest: draw from random, numpy.random or torch, which are seeded by (seed", told)


def test_samples_that_cannot_be_stacked(tmp_path: Path) -> None:
    """Are told with their numbers when they meet: names that only some have, and unequal shapes."""
    with pytest.raises(DrumlineError) as caught:
        rows_of(tmp_path, "unequal").collate(np.arange(3), np.zeros(3, dtype=np.uint64))
    assert "samples 0, 1, 2: " in str(caught.value)
    heard("'x' has the shapes (1,) and (2,) and (3,). Nearest: a method collate(samples) of the data set that", str(caught.value))  # fmt: skip
    padded = torch.nn.utils.rnn.pad_sequence([torch.ones(1 + n) for n in range(3)])
    assert padded.shape == (3, 3)
    with pytest.raises(ValueError, match="only some") as caught:
        _stacked([{"x": 1.0}, {"x": 1.0, "y": 2.0}])
    heard("only some have 'y'. Nearest: the same names in all", str(caught.value))


def rows_of(folder: Path, kind: str, *, keeps_masks: bool = False) -> Rows:
    data = section(folder, wrong=kind)
    task = find_task(data, str(folder))
    return Rows(prepare(data, str(folder)), "train", task, keeps_masks=keeps_masks)


def test_what_samples_hold_reaches_the_loss(tmp_path: Path) -> None:
    """bf16 becomes fp32; a mask of their own is never left out, whatever is in it."""
    narrow = rows_of(tmp_path, "narrow").collate(np.arange(2), np.zeros(2, dtype=np.uint64))
    assert narrow["x"].dtype == np.float32
    assert (narrow["x"] == 0.5).all()
    rows = rows_of(tmp_path, "masked", keeps_masks=True)
    found = micro_batch_tensors(rows, np.arange(2), True, False, np.zeros(2, dtype=np.uint64))
    assert found["attention_mask"].tolist() == [[0.5] * 3] * 2
    plan = plan_of("quantiles", "ddp", (6, 1, 2))
    assert open_rows(plan, "train").keeps_masks


def test_a_metric_that_the_loss_does_not_report(tmp_path: Path, forked: Any) -> None:
    """Refused before the first step, with those that there are; with one of them the run is trained."""
    for file in EXAMPLES.glob("quantiles.*"):
        shutil.copy(file, tmp_path)
    short = ["duration.steps=2", "evaluation.every_steps=1", "launch.max_restarts=0"]
    wrong = "early_stopping.metric=eval/near"
    done = forked("run", "quantiles.yaml", *short, wrong, "--run-dir", "wrong")
    assert done.returncode != 0
    told = (tmp_path / "wrong/logs/attempt-0/rank-0.log").read_text() + done.stderr
    heard("reports loss, below. Nearest: early_stopping.metric=eval/loss", told)
    done = forked(
        "run", "quantiles.yaml", *short, "early_stopping.metric=eval/loss", "--run-dir", "right"
    )
    assert done.returncode == 0, done.stderr


def test_other_samples_under_the_same_code_are_noticed(tmp_path: Path) -> None:
    """Their fingerprint differs, so a resume is refused."""
    from drumline.data.dataset_manifest import read_dataset_manifest

    found = []
    for value in (1.0, 2.0):
        torch.save(torch.full((8, 2), value), tmp_path / "values.pt")
        (tmp_path / "mine.py").write_text(
            "import torch\n\n\ndef data():\n    return [{'x': row} for row in torch.load('"
            + str(tmp_path / "values.pt")
            + "')]\n"
        )
        raw = section_of(tmp_path)
        manifest = read_dataset_manifest(prepare(raw, str(tmp_path)))
        assert manifest
        found.append(manifest.fingerprint)
    assert found[0] != found[1]


def section_of(folder: Path) -> Any:
    from drumline.recipe.data_section import Data

    return Data.model_validate({"source": "dataset", "factory": "mine:data", "task": "custom"})


def test_workers_are_forked_with_what_their_code_imports(arena: Arena) -> None:
    """Each worker of each evaluation would import it again; rows without code of a project need none of it."""
    plan = plan_of("quantiles", "ddp", SPLITS[0])
    assert MicroBatches(plan, open_rows(plan, "train")).imports == ["drumline.train.objectives"]
    text = arena.plan("ddp", (3, 1, 4))
    assert MicroBatches(text, open_rows(text, "train")).imports == []
