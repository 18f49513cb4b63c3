"""Runs on mixtures under every engine: one curve at any split, and the loss of each source."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from arena import PARITY, SPLITS, STEPS, Arena
from torch.nn import functional

from drumline.plan.model import Plan, read_plan
from drumline.train.batches import open_rows
from drumline.train.models import ModelBuilder

pytestmark = [pytest.mark.xdist_group("kinds"), pytest.mark.heavy]

ENGINES = ["ddp", "fsdp", "accelerate", "zero2", "zero3"]
LABELS = ("pairs", "few")
LLAMA = {"source": "config", "architecture": "llama", "config": {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257}}  # fmt: skip


def mixture(arena: Arena) -> dict[str, Any]:
    few = arena.folder / "few.jsonl"
    few.write_text(
        "".join(
            json.dumps({"prompt": f"q{n}", "completion": "zebra " * (n % 4 + 1)}) + "\n"
            for n in range(7)
        )
    )
    return {
        "source": "mixture",
        "path": None,
        "validation": 0.15,
        "mixture": [
            {"weight": 0.6, "source": "files", "path": str(arena.data)},
            {"weight": 0.4, "source": "files", "path": str(few)},
        ],
    }


def plan_of(arena: Arena, engine: str, split: tuple[int, int, int], **changes: Any) -> Plan:
    data, evaluation = mixture(arena), {"every_steps": 4, "per_device": 2}
    return arena.plan(engine, split, data=data, evaluation=evaluation, model=LLAMA, **changes)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("mixtures"))
    for engine, split in PARITY:
        made.ask("train", f"{engine}-{split}", plan_of(made, engine, split))
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)), stop_after=5)
    chunked = plan_of(made, "fsdp", (2, 2, 3), loss={"chunked": True})
    made.ask("train", "chunked", chunked)
    noisy = plan_of(made, "ddp", (2, 2, 3), logging={"noise_scale": True})
    made.ask("train", "noisy", noisy)
    made.ask("train", "by sample", plan_of(made, "ddp", (3, 2, 2), batch={"weighting": "sample"}))
    made.ask("verify", "verify", plan_of(made, "zero3", (2, 2, 3)), fault="")
    made.go()
    for engine in ENGINES:
        made.ask("train", f"stopped-{engine}", plan_of(made, engine, (3, 2, 2)))
    made.go()
    return made


def losses(arena: Arena, name: str) -> list[list[float]]:
    return [
        [line[key] for line in arena.lines(name)]
        for key in ("loss", *(f"loss/{label}" for label in LABELS))
    ]


@pytest.mark.parametrize(("engine", "split"), PARITY, ids=str)
def test_a_mixture_is_one_curve_at_every_split(
    arena: Arena, engine: str, split: tuple[int, int, int]
) -> None:
    """Samples, losses, and the losses of each source."""
    name, reference = f"{engine}-{split}", f"ddp-{SPLITS[0]}"
    ours, theirs = arena.lines(name), arena.lines(reference)
    assert len(ours) == STEPS
    for key in ("digest", "weight", "epoch"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for mine, wanted in zip(losses(arena, name), losses(arena, reference), strict=True):
        assert mine == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_resumes_bitwise(arena: Arena, engine: str) -> None:
    """Stopped after step 5."""
    assert losses(arena, f"stopped-{engine}") == losses(arena, f"{engine}-(3, 2, 2)")


def test_the_loss_of_a_source_is_that_of_its_rows(arena: Arena) -> None:
    """Of the first step, row by row, by transformers' own model; every epoch has its shares."""
    name = f"ddp-{SPLITS[0]}"
    plan = read_plan((arena.folder / name / "plan.json").read_text())
    assert [(own.label, own.rows) for own in plan.data.mixture] == [("pairs", 34), ("few", 6)]
    assert [own.share for own in plan.data.mixture] == [24, 16]
    rows = open_rows(plan, "train")
    model = ModelBuilder(plan.recipe, rows.manifest).whole().requires_grad_(False)
    indices = plan.samples_at(*plan.clock().slots(1))
    sums, counts = np.zeros(2), np.zeros(2)
    for index in indices:
        batch = {k: torch.from_numpy(v) for k, v in rows.collate(np.array([index])).items()}
        logits = model(batch["input_ids"]).logits[0]
        found = functional.cross_entropy(logits, batch["targets"][0], reduction="sum")
        sums[int(index >= 34)] += float(found)
        counts[int(index >= 34)] += int((batch["targets"] != -100).sum())
    first = arena.lines(name)[0]
    assert counts.sum() == first["weight"]
    assert [first[f"loss/{label}"] for label in LABELS] == pytest.approx(sums / counts, rel=1e-5)
    assert first["loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


def test_other_ways_to_compute_it(arena: Arena) -> None:
    """In chunks, with the noise scale beside it, and weighted by samples."""
    reference = losses(arena, f"ddp-{SPLITS[0]}")
    for name in ("chunked", "noisy"):
        for mine, wanted in zip(losses(arena, name), reference, strict=True):
            assert mine == pytest.approx(wanted, abs=2e-5)
    for line in arena.lines("by sample"):
        parts = [line[f"loss/{label}"] for label in LABELS if line[f"loss/{label}"] is not None]
        assert min(parts) - 1e-6 <= line["loss"] <= max(parts) + 1e-6
    assert losses(arena, "by sample")[0] != reference[0]
    assert arena.verdict("verify") == (True, True)


def test_each_source_is_evaluated(arena: Arena) -> None:
    """The rows of each that were held out, beside all of them."""
    lines = (arena.folder / f"zero3-{SPLITS[1]}" / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]
    assert len(found) == 2
    for line in found:
        parts = [line[f"eval/{label}/loss"] for label in LABELS]
        assert min(parts) <= line["eval/loss"] <= max(parts)
