"""Weights that training leaves as they are: written once, linked after that, and never taken for granted."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from savers import one_saver, pieces, tensors

from drumline.checkpoint.boxes import whole as whole_box
from drumline.checkpoint.manifest import verify
from drumline.checkpoint.shards import frozen_name, read_entries, shard_name
from drumline.checkpoint.state import TrainState
from drumline.recipe.schema import Checkpoint
from drumline.train import loader, shard_writer
from drumline.train.saver import Saver
from drumline.train.tensor_shard import TensorShard

FROZEN = ("model.a", "model.c")
NAME = frozen_name(0)


def shards() -> dict[str, TensorShard]:
    """A small model's state on one rank, two of its weights frozen."""
    return pieces(tensors(1), 0, 1, False, FROZEN)


def step(ours: Saver, parts: dict[str, TensorShard], number: int, **options: Any) -> None:
    """What training changes, and a save."""
    for name in ("model.b", "optimizer.a.step"):
        parts[name].tensor.add_(1)
    ours.save(parts, TrainState(step=number), **options)
    ours.wait()


def place(folder: Path, number: int) -> Path:
    """The file of the frozen weights in the checkpoint of a step."""
    return folder / f"step-{number:08d}" / NAME


def check(folder: Path, number: int, parts: dict[str, TensorShard]) -> None:
    """The checkpoint is sound and loads as what is in memory."""
    path = folder / f"step-{number:08d}"
    assert verify(path).step == number
    empty = {
        name: TensorShard(torch.full_like(p.tensor, 9), p.shape, whole_box(p.shape), True)
        for name, p in parts.items()
    }
    loader.load(path, empty)
    for name, piece in parts.items():
        assert torch.equal(piece.tensor, empty[name].tensor), name


@pytest.mark.parametrize("is_async", [True, False])
def test_they_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """Three saves, the last with the weights' sums: one file of them, and nothing else is shared."""
    written: list[str] = []
    real = shard_writer.save_file

    def watched(what: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path.name)
        real(what, path)

    monkeypatch.setattr(shard_writer, "save_file", watched)
    ours, parts = one_saver(tmp_path, keep_last=9, **{"async": is_async}), shards()
    ours.begin(parts)
    for number in (1, 2, 3):
        step(ours, parts, number, is_final=number == 3)
        if number != 2:  # the others are read back at the end
            check(tmp_path, number, parts)
    assert written == [shard_name(0), NAME, shard_name(0), shard_name(0)]
    assert len({place(tmp_path, number).stat().st_ino for number in (1, 2, 3)}) == 1
    entries = read_entries(tmp_path / "step-00000002", 0)
    assert {name for name, entry in entries.items() if entry["file"] == NAME} == set(FROZEN)
    assert verify(tmp_path / "step-00000002").step == 2


def test_the_checkpoint_they_were_written_for_may_be_deleted(tmp_path: Path) -> None:
    """With keep_last 1 each save deletes what the next but one would link to."""
    ours, parts = one_saver(tmp_path, keep_last=1), shards()
    ours.begin(parts)
    inodes = set()
    for number in (1, 2, 3):
        step(ours, parts, number)
        check(tmp_path, number, parts)
        inodes.add(place(tmp_path, number).stat().st_ino)
    assert len(inodes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_resumed_run_links_to_what_it_loaded(tmp_path: Path) -> None:
    """Its first save compares digests with the manifest of the checkpoint that it loaded."""
    ours, parts = one_saver(tmp_path), shards()
    ours.begin(parts)
    step(ours, parts, 1)
    commit = ours._commit
    again = Saver(tmp_path, Checkpoint(), commit, 0, saved_step=1)
    again.begin(parts)
    step(again, parts, 2)
    assert place(tmp_path, 1).samefile(place(tmp_path, 2))
    parts["model.a"].tensor.data.add_(1)  # another one's weights under the same name
    other = Saver(tmp_path, Checkpoint(keep_last=9), commit, 0, saved_step=2)
    other.begin(parts)
    step(other, parts, 3)
    assert not place(tmp_path, 2).samefile(place(tmp_path, 3))
    check(tmp_path, 3, parts)


def swap(tensor: torch.Tensor, one: int, other: int) -> None:
    """Two elements change places, which leaves their sum as it is."""
    flat = tensor.data.view(-1)
    flat[[one, other]] = flat[[other, one]]


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "one element": lambda t: t.data.view(-1)[3].add_(1e-3),
    "the sign of a zero": lambda t: t.data.view(-1)[0].neg_(),
    "neighbours change places": lambda t: swap(t, 2, 4),
    "elements of different rows change places": lambda t: swap(t, 5, 5 + 2 * 1024 * 3),
    "a row is moved": lambda t: t.data.copy_(t.data.roll(1, 0)),
    "the last element": lambda t: t.data.view(-1)[-1].add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_changes_all_the_same_is_saved_as_it_is(tmp_path: Path, change: str) -> None:
    """As a momentum encoder does, by `.data` and so without a new version of the tensor."""
    ours, parts = one_saver(tmp_path, keep_last=9), shards()
    values = torch.randn(9, 2047, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 0
    parts["model.a"] = TensorShard(values, (9, 2047), whole_box((9, 2047)), True, frozen=True)
    ours.begin(parts)
    step(ours, parts, 1)
    CHANGES[change](values)
    step(ours, parts, 2)
    check(tmp_path, 2, parts)
    assert verify(tmp_path / "step-00000001").step == 1
    entries = read_entries(tmp_path / "step-00000002", 0)
    files = {name: entry["file"] for name, entry in entries.items()}
    assert (files["model.a"], files["model.c"]) == (shard_name(0), NAME)


def test_a_change_while_it_is_written_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a weight is copied as the trained ones are; the save has the state of its call."""
    ours, parts = one_saver(tmp_path), shards()
    ours.begin(parts)
    parts["model.a"].tensor.data.add_(1)
    real = shard_writer.save_file

    def late(what: dict[str, torch.Tensor], path: Path) -> None:
        parts["model.a"].tensor.data.add_(1)
        real(what, path)

    monkeypatch.setattr(shard_writer, "save_file", late)
    wanted = parts["model.a"].tensor.clone()
    step(ours, parts, 1)
    parts["model.a"].tensor.data.copy_(wanted)
    check(tmp_path, 1, parts)


def test_a_first_change_while_it_is_written_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read after the call: what is no longer the state of the call is refused, and saved the next time."""
    ours, parts = one_saver(tmp_path, on_error="continue"), shards()
    ours.begin(parts)
    real = shard_writer.save_file

    def late(what: dict[str, torch.Tensor], path: Path) -> None:
        parts["model.a"].tensor.data.add_(1)
        real(what, path)

    monkeypatch.setattr(shard_writer, "save_file", late)
    step(ours, parts, 1)
    (told,) = ours.take_errors()
    assert told.endswith("model.a needs no gradient, but changed while it was written")
    assert not list(tmp_path.glob("*step-*"))
    monkeypatch.setattr(shard_writer, "save_file", real)
    step(ours, parts, 2)
    check(tmp_path, 2, parts)


def test_without_hard_links_they_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.link` is stood in for: no file system here refuses it."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    ours, parts = one_saver(tmp_path), shards()
    ours.begin(parts)
    for number in (1, 2):
        step(ours, parts, number)
        check(tmp_path, number, parts)
    assert not place(tmp_path, 1).samefile(place(tmp_path, 2))


def test_what_the_checkpoint_before_has_lost_is_written_again(tmp_path: Path) -> None:
    """Cut short, replaced by a link, or gone: the new checkpoint is whole."""
    ours, parts = one_saver(tmp_path, keep_last=9), shards()
    ours.begin(parts)
    step(ours, parts, 1)
    os.truncate(place(tmp_path, 1), 20)
    step(ours, parts, 2)
    check(tmp_path, 2, parts)
    place(tmp_path, 2).rename(tmp_path / "elsewhere")
    place(tmp_path, 2).symlink_to(tmp_path / "elsewhere")
    step(ours, parts, 3)
    check(tmp_path, 3, parts)
    place(tmp_path, 3).unlink()
    step(ours, parts, 4)
    check(tmp_path, 4, parts)


@pytest.mark.parametrize("is_changed", [True, False])
def test_what_a_failed_save_left_is_in_nobodys_way(tmp_path: Path, is_changed: bool) -> None:
    """A link in its folder leads to a sound checkpoint's file, which must not be written to."""
    ours, parts = one_saver(tmp_path, keep_last=9), shards()
    ours.begin(parts)
    step(ours, parts, 1)
    left = tmp_path / ".step-00000002.tmp"
    left.mkdir()
    os.link(place(tmp_path, 1), left / NAME)
    if is_changed:
        parts["model.a"].tensor.data.add_(1)  # so that the file is another one
    step(ours, parts, 2)
    check(tmp_path, 2, parts)
    assert verify(tmp_path / "step-00000001").step == 1
    assert place(tmp_path, 1).samefile(place(tmp_path, 2)) is not is_changed
