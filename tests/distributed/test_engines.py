"""One curve under every engine: parity, one checkpoint format, the same bits after a resume, faults."""

import shutil

import pytest
import torch
from arena import ENGINES, STEPS, Arena
from whole_tensors import whole_tensors

pytestmark = [pytest.mark.xdist_group("matrix"), pytest.mark.heavy]

SPLITS = [(3, 1, 4), (3, 2, 2), (2, 2, 3)]
PRECISIONS = ["bf16", "fp16"]
LOWER = ["ddp", "fsdp", "accelerate", "zero0", "zero1", "zero2", "zero3"]
MASTERS = ["zero1", "zero2", "zero3"]
"""Engines whose bf16 has 16-bit weights, and fp32 masters in the optimizer."""
SAVERS = list(ENGINES)
CHECKPOINTED = ["accelerate", "zero2", "zero3"]
ANCHORS = ("ddp", "zero3")
HANDED_OVER = [
    (saver, loader) for saver in SAVERS for loader in ENGINES if {saver, loader} & {*ANCHORS}
]
"""Every engine reads what two of them wrote, and its own checkpoints are read by these two."""
CUT = 6
"""Of STEPS: two epochs; the fourth step of each has five samples, so that ranks and micro-batches stand empty."""


def name_of(engine: str, split: tuple[int, int, int]) -> str:
    return f"{engine}-{'x'.join(map(str, split))}"


FAULTS = ["mean of means", "doubled 1/k", "a tick per process", "dropout on one rank"]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    made = Arena(tmp_path_factory.mktemp("arena"))
    for engine in ENGINES:
        for split in SPLITS:
            made.ask("train", name_of(engine, split), made.plan(engine, split))
    for precision in PRECISIONS:
        for engine in LOWER:
            name = f"{precision}-{engine}"
            made.ask("train", name, made.plan(engine, (3, 2, 2), precision=precision))
    for engine in CHECKPOINTED:
        plan = made.plan(engine, (2, 2, 3), model={"activation_checkpointing": "full"})
        made.ask("train", f"recomputed-{engine}", plan)
        policy = {"activation_checkpointing": "selective", "activation_offload": True}
        made.ask("train", f"selective-{engine}", made.plan(engine, (2, 2, 3), model=policy))
    made.ask("verify", "sound", made.plan("zero2", (3, 2, 2)), fault="")
    for engine in (*MASTERS, "zero2-offload"):
        plan = made.plan(engine, (3, 2, 2), precision="bf16")
        made.ask("verify", f"bf16-sound-{engine}", plan, fault="")
    for fault in FAULTS:
        plan = made.plan("ddp", (3, 2, 2), model={"config": {"resid_pdrop": 0.1}})
        made.ask("verify", fault, plan, fault=fault)
    made.go()
    for saver, loader in HANDED_OVER:  # the checkpoint of a step at two ranks
        for split in ((3, 1, 4), (2, 2, 3)):
            where = made.folder / f"{saver}-to-{name_of(loader, split)}"
            source = made.folder / name_of(saver, (3, 2, 2))
            shutil.copytree(
                source / f"checkpoints/step-{CUT:08d}", where / f"checkpoints/step-{CUT:08d}"
            )
            shutil.copy(source / "metrics.jsonl", where / "metrics.jsonl")
            made.ask("train", where.name, made.plan(loader, split))
    for loader in ENGINES:
        for split in ((3, 1, 4), (2, 2, 3)):
            source = made.folder / name_of("zero3", (3, 2, 2)) / f"checkpoints/step-{CUT:08d}"
            made.ask(
                "reload",
                f"reload-{name_of(loader, split)}",
                made.plan(loader, split),
                source=str(source),
            )
    for (
        engine
    ) in MASTERS:  # bf16 checkpoints, into the engines that have no 16-bit weights and back
        for saver, loader in ((engine, "fsdp"), ("fsdp", engine)):
            where = made.folder / f"bf16-{saver}-to-{loader}"
            source = made.folder / f"bf16-{saver}/checkpoints/step-{CUT:08d}"
            shutil.copytree(source, where / f"checkpoints/step-{CUT:08d}")
            shutil.copy(made.folder / f"bf16-{saver}/metrics.jsonl", where / "metrics.jsonl")
            made.ask("train", where.name, made.plan(loader, (2, 2, 3), precision="bf16"))
            copy = f"bf16-reload-{saver}-{loader}"
            made.ask(
                "reload", copy, made.plan(loader, (2, 2, 3), precision="bf16"), source=str(source)
            )
    made.go()
    return made


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_the_same(
    arena: Arena, engine: str, split: tuple[int, int, int]
) -> None:
    """fp32 losses within 1e-5 relative of one process, the same digests, the same learning rates."""
    ours, reference = arena.lines(name_of(engine, split)), arena.lines(name_of("ddp", (3, 1, 4)))
    assert len(ours) == len(reference) == STEPS
    for mine, theirs in zip(ours, reference, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"]
        assert abs(mine["grad_norm"] - theirs["grad_norm"]) < 1e-4 * theirs["grad_norm"]
        assert (mine["digest"], mine["lr"]) == (theirs["digest"], theirs["lr"])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", LOWER)
def test_lower_precisions_mean_the_same(arena: Arena, engine: str, precision: str) -> None:
    """Autocast, or 16-bit weights with fp32 masters: the fp32 curve to the type's rounding.

    fp16's loss scale overflows at the same steps in every engine, if at all.
    """
    ours, ddp = arena.lines(f"{precision}-{engine}"), arena.lines(f"{precision}-ddp")
    reference = arena.lines(name_of("ddp", (3, 1, 4)))
    assert [line["skipped"] for line in ours] == [line["skipped"] for line in ddp]
    for mine, same, theirs in zip(ours, ddp, reference, strict=True):
        assert abs(mine["loss"] - same["loss"]) < 5e-3 * same["loss"]
        assert (mine["digest"], mine["lr"]) == (theirs["digest"], theirs["lr"])
    assert not any(line["skipped"] for line in ours)
    assert all(
        abs(m["loss"] - t["loss"]) < 5e-3 * t["loss"] for m, t in zip(ours, reference, strict=True)
    )
    assert any(m["loss"] != t["loss"] for m, t in zip(ours, reference, strict=True))


@pytest.mark.parametrize("engine", CHECKPOINTED)
@pytest.mark.parametrize("policy", ["recomputed", "selective"])
def test_recomputed_activations_change_nothing(arena: Arena, policy: str, engine: str) -> None:
    """activation_checkpointing full, and selective with offload: the same losses."""
    pairs = zip(
        arena.lines(f"{policy}-{engine}"), arena.lines(name_of("ddp", (3, 1, 4))), strict=True
    )
    assert all(abs(mine["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"] for mine, theirs in pairs)


@pytest.mark.parametrize(("saver", "loader"), HANDED_OVER)
@pytest.mark.parametrize("split", [(3, 1, 4), (2, 2, 3)], ids=str)
def test_a_checkpoint_of_any_engine_goes_on_in_any_other(
    arena: Arena, saver: str, loader: str, split: tuple[int, int, int]
) -> None:
    """Saved at two ranks, resumed at one and at two: the next steps' losses within 1e-5."""
    ours = arena.lines(f"{saver}-to-{name_of(loader, split)}")
    reference = arena.lines(name_of(saver, (3, 2, 2)))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, theirs in zip(ours[CUT:], reference[CUT:], strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"]
        assert abs(mine["grad_norm"] - theirs["grad_norm"]) < 1e-3 * theirs["grad_norm"]


@pytest.mark.parametrize("split", [(3, 1, 4), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("loader", ENGINES)
def test_what_is_loaded_is_what_was_saved(
    arena: Arena, loader: str, split: tuple[int, int, int]
) -> None:
    """ZeRO-3's checkpoint through any engine: weights, moments and steps come out as they went in."""
    source = arena.folder / name_of("zero3", (3, 2, 2)) / f"checkpoints/step-{CUT:08d}"
    copy = arena.folder / f"reload-{name_of(loader, split)}/checkpoints/step-{CUT:08d}"
    saved, loaded = whole_tensors(source), whole_tensors(copy)
    assert set(saved) == set(loaded)
    assert {name.split(".")[0] for name in saved} == {"model", "optimizer"}
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert any(saved[name].abs().sum() > 0 for name in saved if name.endswith("exp_avg_sq"))


@pytest.mark.parametrize("engine", MASTERS)
def test_bf16_under_zero_saves_its_masters(arena: Arena, engine: str) -> None:
    """Weights and moments of the checkpoint are fp32, with more digits than bf16 has."""
    source = arena.folder / f"bf16-{engine}/checkpoints/step-{CUT:08d}"
    for name, value in whole_tensors(source).items():
        assert value.dtype == torch.float32
        if name.startswith("model.") and value.ndim > 1:
            assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.parametrize(
    ("saver", "loader"), [(e, "fsdp") for e in MASTERS] + [("fsdp", e) for e in MASTERS]
)
def test_bf16_goes_on_in_another_engine(arena: Arena, saver: str, loader: str) -> None:
    """Between ZeRO's masters and FSDP2's fp32 shards: loaded to the bit, and the curve goes on."""
    source = arena.folder / f"bf16-{saver}/checkpoints/step-{CUT:08d}"
    copy = arena.folder / f"bf16-reload-{saver}-{loader}/checkpoints/step-{CUT:08d}"
    saved, loaded = whole_tensors(source), whole_tensors(copy)
    assert set(saved) == set(loaded)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    ours, reference = arena.lines(f"bf16-{saver}-to-{loader}"), arena.lines(f"bf16-{saver}")
    for mine, theirs in zip(ours[CUT:], reference[CUT:], strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 5e-3 * theirs["loss"]


@pytest.mark.parametrize("engine", [*MASTERS, "zero2-offload"])
def test_verify_is_green_in_zeros_own_bf16(arena: Arena, engine: str) -> None:
    """16-bit weights on both sides: the gradient of the split is that of the undivided batch."""
    assert arena.verdict(f"bf16-sound-{engine}") == (True, True)


def test_verify_is_green_where_nothing_is_wrong(arena: Arena) -> None:
    """A sound split passes both parts."""
    assert arena.verdict("sound") == (True, True)


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_goes_red(arena: Arena, fault: str) -> None:
    """Each planted fault is found, by the part that it is for."""
    assert arena.verdict(fault) == (
        (True, False) if fault == "a tick per process" else (False, True)
    )
