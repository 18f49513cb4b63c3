"""Models of images and text at every split, with a worker, resumed; their memory, and what they need of DDP."""

from typing import Any

import numpy as np
import pytest
import torch
from arena import STEPS, Arena

from advice import heard
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.session.planning import with_trace
from drumline.session.row_lengths import manifest_of_run
from drumline.trace.rehearse import rehearse
from drumline.train.batches import StepReader, open_rows
from drumline.train.models import ModelBuilder, builder
from vision_folders import FAMILIES, chats_in, model_folder

pytestmark = [pytest.mark.xdist_group("vision"), pytest.mark.heavy]

SPLITS = [(6, 1, 2), (3, 2, 2), (2, 2, 3)]
RUNS = [("ddp", split) for split in SPLITS] + [("fsdp", SPLITS[2]), ("zero3", SPLITS[1])]
KINDS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "llava": {"adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
}  # fmt: skip
"""A whole model is trained, and an adapter of another."""


def plan_of(
    arena: Arena, family: str, engine: str, split: tuple[int, int, int], workers: int = 0
) -> Plan:
    path, folder = arena.folder / "chats.jsonl", arena.folder / family
    if not path.exists():
        chats_in(arena.folder)
    if not folder.exists():
        model_folder(family, folder)
    return arena.plan(
        engine,
        split,
        model={"source": "folder", "path": str(folder), **KINDS.get(family, {})},
        data={
            "source": "files", "path": str(path), "task": "sft", "image_field": "images", "tokenizer": str(folder),
            "image": {"processor": str(folder)}, "sequence_length": 96, "validation": 0.2, "workers": workers,
        },
        evaluation={"every_steps": 4, "per_device": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("vision"))
    made.ask("train", "workers", plan_of(made, "qwen2_5_vl", "ddp", SPLITS[1], workers=1))
    made.train_kinds(KINDS, RUNS, plan_of, SPLITS[1])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_curve(arena: Arena, kind: str) -> None:
    """Under every engine, evaluations too, with micro-batches of no, one and several images; it learns."""
    wanted = arena.curve(f"{kind}-ddp-{SPLITS[0]}")
    assert len(wanted) == STEPS + 2
    for engine, split in RUNS[1:]:
        for ours, theirs in zip(arena.curve(f"{kind}-{engine}-{split}"), wanted, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-5, abs=2e-5), (engine, split)
    losses = [line["loss"] for line in wanted if "loss" in line]
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_give_the_same_gradients(arena: Arena, kind: str) -> None:
    """Those without an image run without any; the model's own loss is ours."""
    assert arena.verdict(f"verify-{kind}") == (True, True)
    assert arena.own_loss(f"verify-{kind}")


def test_a_worker_and_a_resume_change_nothing(arena: Arena) -> None:
    """Bitwise."""
    for kind in KINDS:
        assert arena.curve(f"stopped-{kind}") == arena.curve(f"{kind}-ddp-{SPLITS[1]}")
    assert arena.curve("workers") == arena.curve(f"qwen2_5_vl-ddp-{SPLITS[1]}")


def test_a_micro_batch_without_images_has_one_beside_it(arena: Arena) -> None:
    """So that every forward uses the same weights; the row beside it has no target."""
    plan = plan_of(arena, "qwen2_5_vl", "ddp", (1, 2, 6))
    rows = open_rows(plan, "train")
    seen = set()
    for number in (1, 2):
        for micro_batch in StepReader(plan, rows, 0).read(number).micro_batches:
            tensors, images = micro_batch.tensors, rows.array("files", micro_batch.indices)
            assert len(tensors["image_grid_thw"]) >= 1
            assert len(tensors["input_ids"]) == 1 + (not len(images[0]))
            assert (tensors["targets"][1:] == -100).all()
            assert (tensors["targets"][0] >= 0).any()
            seen.add(len(images[0]))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_its_memory_is_traced(arena: Arena, family: str) -> None:
    """Of the row with the most features; fake tensors allocate what real ones do, though the models look at values."""
    plan = plan_of(arena, family, "ddp", SPLITS[0])
    assert plan.memory.method == "unknown"
    manifest = manifest_of_run(plan)
    fake, real = rehearse(plan, manifest), rehearse(plan, manifest, fake=False)
    assert fake.peak(1).bytes == pytest.approx(real.peak(1).bytes, rel=2e-3)
    assert with_trace(plan, fake.traced()).memory.fits
    unprepared = rehearse_error(plan)
    assert heard(
        "is not known until the data are prepared. Nearest: `drumline prepare`", unprepared
    )


def rehearse_error(plan: Plan) -> str:
    """What a trace says where there are no prepared data."""
    with pytest.raises(PlanError) as error:
        rehearse(
            plan.__class__(
                **{**vars(plan), "data": plan.data.__class__(**{**vars(plan.data), "cache": None})}
            )
        )
    return str(error.value)


def test_each_part_of_a_model_begins_by_its_own_rule(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no file holds, such as the numbers of CLIP's patches; without the rule it is refused, not left to chance."""
    plan = plan_of(arena, "llava", "ddp", SPLITS[0])
    manifest = manifest_of_run(plan)
    assert manifest
    model: Any = ModelBuilder(plan.recipe, manifest).whole()
    numbers = model.get_submodule("model.vision_tower.embeddings").position_ids
    assert torch.equal(numbers, torch.arange(numbers.numel())[None])
    monkeypatch.setattr(builder._InitRules, "_assign", lambda *_: None)  # the whole model's for all
    with pytest.raises(PlanError) as error:
        ModelBuilder(plan.recipe, manifest).whole()
    assert heard("they would be what stood in memory. Nearest: model.factory", str(error.value))


def test_the_trace_takes_the_largest_rows(arena: Arena) -> None:
    """One more than a micro-batch has, since one without images would have a row beside it."""
    rows = open_rows(plan_of(arena, "qwen2_5_vl", "ddp", SPLITS[0]), "train")
    found = rows.task.largest(rows, 3)
    sizes = [
        rows.collate(np.array([n])).get("pixel_values", np.zeros(0)).size for n in range(len(rows))
    ]
    assert len(found) == 4
    assert sizes[found[0]] == max(sizes)
    assert sizes[found[-1]] > 0
