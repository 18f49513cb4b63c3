"""Checkpoints on disk: whole or absent, verified before use, read back at any split."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.errors import CheckpointError
from toolkit.recipe.schema import Checkpoint
from toolkit.train import checkpoint
from toolkit.train.checkpoint import Saver, TrainState
from toolkit.train.engines.torch import Piece

SHAPES = {"model.a": (7, 3), "model.b": (5,), "optimizer.a.step": (), "model.c": (2, 2, 2)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.b"] = made["model.b"].to(torch.bfloat16)
    return made


def pieces(
    whole: dict[str, torch.Tensor], rank: int, world: int, sharded: bool
) -> dict[str, Piece]:
    """A rank's parts: chunks of the first dimension, or whole tensors dealt round."""
    result = {}
    for number, (name, tensor) in enumerate(whole.items()):
        if sharded and tensor.ndim:
            size = -(-tensor.shape[0] // world)
            start = min(tensor.shape[0], rank * size)
            part = tensor[start : start + size].clone()
            result[name] = Piece(part, tuple(tensor.shape), start, part.numel() > 0)
        else:
            result[name] = Piece(tensor.clone(), tuple(tensor.shape), 0, number % world == rank)
    return result


def save(folder: Path, step: int, world: int = 2, sharded: bool = True, **changes: Any) -> Path:
    """Save `tensors(step)` as that many ranks would, each in its own thread."""
    folder.mkdir(exist_ok=True)
    spec = Checkpoint(**{"keep_last": 99, **changes})
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            saver = Saver(folder, rank, world, 0, spec)
            saver.save(pieces(tensors(step), rank, world, sharded), TrainState(step=step))
            saver.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return folder / checkpoint.checkpoint_name(step)


@pytest.mark.parametrize("write", [(1, False), (2, True), (3, True), (4, True), (3, False)])
@pytest.mark.parametrize("read", [(1, False), (2, True), (3, True), (5, True)])
def test_any_split_reads_what_any_split_wrote(tmp_path: Path, write: Any, read: Any) -> None:
    """Saved by w ranks, sharded or not; loaded by any other number, sharded or not: bitwise."""
    path = save(tmp_path / "c", 3, *write)
    assert checkpoint.verify(path).step == 3
    world, sharded = read
    for rank in range(world):
        expected = pieces(tensors(3), rank, world, sharded)
        empty = {name: Piece(torch.full_like(p.tensor, 9.0), p.shape, p.start, p.owned)
                 for name, p in expected.items()}  # fmt: skip
        checkpoint.load(path, empty)
        for name, piece in expected.items():
            assert torch.equal(piece.tensor, empty[name].tensor), name


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    """An asynchronous save does not see later updates."""
    parts = pieces(tensors(1), 0, 1, False)
    before = {name: piece.tensor.clone() for name, piece in parts.items()}
    saver = Saver(tmp_path, 0, 1, 0, Checkpoint())
    saver.save(parts, TrainState(step=1))
    for piece in parts.values():
        piece.tensor.zero_()
    saver.wait()
    checkpoint.load(tmp_path / "step-00000001", parts)
    assert all(torch.equal(before[name], piece.tensor) for name, piece in parts.items())


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x10
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip_a_bit(p / "rank-1.safetensors"),
        lambda p: flip_a_bit(p / "rank-0.json"),
        lambda p: flip_a_bit(p / "state.json"),
        lambda p: (p / "rank-0.safetensors").unlink(),
        lambda p: (p / "rank-1.safetensors").write_bytes(b""),
        lambda p: (p / "rank-0.safetensors").write_bytes(
            (p / "rank-0.safetensors").read_bytes()[:-8]
        ),
        lambda p: (p / "manifest.json").write_text("{"),
        lambda p: (p / "rank-0.safetensors").write_bytes(
            (p.parent / "step-00000001" / "rank-0.safetensors").read_bytes()
        ),
    ],
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    """One flipped bit, a torn, missing or foreign file: renamed .bad-1, told, and fallen back from."""
    save(tmp_path / "c", 1)
    newest = save(tmp_path / "c", 2)
    damage(newest)
    said: list[str] = []
    found = checkpoint.newest_sound(tmp_path / "c", said.append)
    assert found
    assert found[1].step == 1
    assert len(said) == 1
    assert str(newest) in said[0]
    assert (tmp_path / "c" / "step-00000002.bad-1").is_dir()
    assert not newest.exists()


def test_only_published_checkpoints_are_seen(tmp_path: Path) -> None:
    """Half-written and half-deleted folders are not checkpoints; abandoned parts are removed."""
    good = save(tmp_path / "c", 1)
    half = tmp_path / "c" / ".step-00000002.attempt-0.tmp"
    half.mkdir()
    (half / "rank-0.json").write_text("{}")
    deleted = save(tmp_path / "c", 3)
    (deleted / "manifest.json").unlink()
    assert checkpoint.find_checkpoints(tmp_path / "c") == [good]
    checkpoint.remove_abandoned(tmp_path / "c")
    assert not half.exists()
    assert save(tmp_path / "c", 3).is_dir()


def test_retention_keeps_the_last_the_best_and_the_milestones(tmp_path: Path) -> None:
    """keep_last 2, keep_best 1, keep_every 4; in mode max the largest metric is the best."""
    for mode, best in (("min", 3), ("max", 2)):
        folder = tmp_path / mode
        folder.mkdir()
        spec = Checkpoint(keep_last=2, keep_best=1, keep_every=4)
        saver = Saver(folder, 0, 1, 0, spec)
        for step, metric in enumerate([5.0, 9.0, 1.0, 3.0, 2.0, 6.0, None], start=1):
            state = TrainState(step=step, metric=metric, metric_mode=mode)
            saver.save(pieces(tensors(step), 0, 1, False), state)
            saver.wait()
        kept = [checkpoint.step_of(path) for path in checkpoint.find_checkpoints(folder)]
        assert kept == sorted({best, 4, 6, 7})


def test_another_model_is_refused(tmp_path: Path) -> None:
    """Missing tensors and other shapes are named."""
    path = save(tmp_path / "c", 1)
    parts = pieces(tensors(1), 0, 1, False)
    with pytest.raises(CheckpointError, match="this model lacks model.c"):
        checkpoint.load(path, {name: p for name, p in parts.items() if name != "model.c"})
    parts["model.b"] = Piece(torch.zeros(6), (6,), 0, True)
    with pytest.raises(CheckpointError, match=r"tensor model.b: \[5\] saved, \[6\] here"):
        checkpoint.load(path, parts)


def test_a_rank_that_cannot_write_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's I/O error is every rank's error; the older checkpoint stays sound."""
    save(tmp_path / "c", 1)
    real = checkpoint._write_rank

    def failing(folder: Path, rank: int, snapshot: Any) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        real(folder, rank, snapshot)

    monkeypatch.setattr(checkpoint, "_write_rank", failing)
    with pytest.raises(CheckpointError, match=r"rank-1 failed|rank 1 cannot write.*No space left"):
        save(tmp_path / "c", 2)
    found = checkpoint.newest_sound(tmp_path / "c", lambda line: None)
    assert found
    assert found[1].step == 1


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A checkpoint is safetensors and JSON, nothing else."""
    path = save(tmp_path / "c", 1)
    names = sorted(p.name for p in path.iterdir())
    assert names == ["manifest.json", "rank-0.json", "rank-0.safetensors", "rank-1.json",
                     "rank-1.safetensors", "state.json"]  # fmt: skip
    for name in names:
        if name.endswith(".json"):
            json.loads((path / name).read_text())
