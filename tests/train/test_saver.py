"""Saving and loading: at any split, the state at the call, one host copy, one verdict for all."""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from savers import one_saver, pieces, save, tensors, try_to_save
from torch.distributed import HashStore

from drumline.checkpoint import manifest, retention
from drumline.checkpoint.boxes import whole
from drumline.checkpoint.manifest import checkpoint_name, step_of, verify
from drumline.checkpoint.state import TrainState
from drumline.checkpoint.weights import weight_facts
from drumline.errors import CheckpointError
from drumline.recipe.schema import Checkpoint
from drumline.train import loader
from drumline.train.commit import SaveCommit
from drumline.train.saver import Saver
from drumline.train.shard_writer import ShardWriter, Written
from drumline.train.tensor_shard import TensorShard


@pytest.mark.parametrize("write", [(1, False), (2, True), (3, True), (4, True), (3, False)])
@pytest.mark.parametrize("read", [(1, False), (2, True), (3, True), (5, True)])
def test_any_split_reads_what_any_split_wrote(tmp_path: Path, write: Any, read: Any) -> None:
    """Saved by w ranks, sharded or not; loaded by any other number, sharded or not: bitwise."""
    path = save(tmp_path / "c", 3, *write)
    assert verify(path).step == 3
    world, sharded = read
    for rank in range(world):
        expected = pieces(tensors(3), rank, world, sharded)
        empty = {name: TensorShard(torch.full_like(p.tensor, 9.0), p.shape, p.boxes, p.owned)
                 for name, p in expected.items()}  # fmt: skip
        loader.load(path, empty)
        for name, piece in expected.items():
            assert torch.equal(piece.tensor, empty[name].tensor), name


def test_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous save does not see updates that come while it has not begun to write."""
    may_write = threading.Event()
    real = ShardWriter.write

    def late(*arguments: Any, **options: Any) -> Written:
        may_write.wait(5)
        return real(*arguments, **options)

    monkeypatch.setattr(ShardWriter, "write", late)
    parts = pieces(tensors(1), 0, 1, False)
    before = {name: piece.tensor.clone() for name, piece in parts.items()}
    ours = one_saver(tmp_path)
    ours.save(parts, TrainState(step=1))
    for piece in parts.values():
        piece.tensor.zero_()
    may_write.set()
    ours.wait()
    loader.load(tmp_path / "step-00000001", parts)
    assert all(torch.equal(before[name], piece.tensor) for name, piece in parts.items())


def test_a_second_save_waits_and_reuses_the_one_host_copy(tmp_path: Path) -> None:
    """Save after save goes through the same host buffers; each is whole on disk before the next."""
    ours = one_saver(tmp_path, keep_last=9)
    where = set()
    for step in (1, 2, 3):
        ours.save(pieces(tensors(step), 0, 1, False), TrainState(step=step))
        where.add(tuple(tensor.data_ptr() for tensor in ours._host.values()))
        if step > 1:
            assert verify(tmp_path / f"step-0000000{step - 1}").step == step - 1
    ours.wait()
    assert len(where) == 1
    assert [step_of(path) for path in retention.find_checkpoints(tmp_path)] == [1, 2, 3]


def test_a_synchronous_save_copies_nothing(tmp_path: Path) -> None:
    """With async false the loop waits, so the tensors are written where they lie."""
    ours = one_saver(tmp_path, **{"async": False})
    ours.save(pieces(tensors(1), 0, 1, False), TrainState(step=1))
    assert verify(tmp_path / "step-00000001").step == 1
    assert not ours._host


def test_retention_keeps_the_last_the_best_and_the_milestones(tmp_path: Path) -> None:
    """keep_last 2, keep_best 1, keep_every 4; in mode max the largest metric is the best."""
    for mode, best in (("min", 3), ("max", 2)):
        folder = tmp_path / mode
        folder.mkdir()
        ours = one_saver(folder, keep_last=2, keep_best=1, keep_every=4)
        state = TrainState(metric_mode=mode)
        for step, metric in enumerate([5.0, 9.0, 1.0, 3.0, 2.0, 6.0, None], start=1):
            state.advance(step, step, 1, 0.5)
            state.metric = metric
            ours.save(pieces(tensors(step), 0, 1, False), state)
            ours.wait()
        kept = [step_of(path) for path in retention.find_checkpoints(folder)]
        assert kept == sorted({best, 4, 6, 7})
        assert not list(folder.glob(".*"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    """Missing tensors and other shapes are named."""
    path = save(tmp_path / "c", 1)
    parts = pieces(tensors(1), 0, 1, False)
    with pytest.raises(CheckpointError, match="this model lacks model.c"):
        loader.load(path, {name: p for name, p in parts.items() if name != "model.c"})
    parts["model.b"] = TensorShard(torch.zeros(6), (6,), whole((6,)), True)
    with pytest.raises(CheckpointError, match=r"tensor model.b: \[5\] saved, \[6\] here"):
        loader.load(path, parts)


def test_host_buffers_are_made_before_the_first_save(tmp_path: Path) -> None:
    """All of what is copied, none of what is frozen; both saves use them."""
    parts = pieces(tensors(1), 0, 1, False, ["model.c"])
    ours = one_saver(tmp_path)
    ours.begin(parts)
    assert ours._making
    ours._making.join()
    made = {name: buffer.data_ptr() for name, buffer in ours._host.items()}
    assert set(made) == set(parts) - {"model.c"}
    for step in (1, 2):
        ours.save(parts, TrainState(step=step))
        ours.wait()
        assert {name: buffer.data_ptr() for name, buffer in ours._host.items()} == made
    assert verify(tmp_path / "step-00000002").step == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_one_ranks_error_is_every_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """All ranks raise the same words; the older checkpoint stays sound, nothing half-written stays."""
    save(tmp_path / "c", 1)
    real = ShardWriter.write

    def failing(self: ShardWriter, *rest: Any, **options: Any) -> Written:
        if self.rank == broken:
            raise OSError(28, "No space left on device")
        return real(self, *rest, **options)

    monkeypatch.setattr(ShardWriter, "write", failing)
    errors = try_to_save(tmp_path / "c", 2)
    words = f"{tmp_path}/c/step-00000002: rank {broken} cannot write: No space left on device"
    assert [str(error) for error in errors] == [words, words]
    found = retention.newest_sound(tmp_path / "c", lambda line: None)
    assert found
    assert found[1].step == 1
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]


def test_a_vanished_folder_and_a_file_in_its_place_are_errors(tmp_path: Path) -> None:
    """The folder is not made anew in silence, and every rank names what is wrong."""
    for world in (1, 2):
        errors = try_to_save(tmp_path / "gone", 1, world)
        assert all("cannot write: No such file or directory" in str(error) for error in errors)
    (tmp_path / "file").write_text("")
    errors = try_to_save(tmp_path / "file", 1)
    assert all("cannot write: Not a directory" in str(error) for error in errors)


def test_what_must_be_on_disk_first_can_refuse(tmp_path: Path) -> None:
    """Metrics that cannot be written make the save fail: a checkpoint never runs ahead of them."""
    ours = one_saver(tmp_path)

    def refuse() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    ours._before_publishing = refuse
    ours.save(pieces(tensors(1), 0, 1, False), TrainState(step=1))
    with pytest.raises(CheckpointError, match="No space left"):
        ours.wait()
    assert not list(tmp_path.iterdir())


def test_going_on_after_a_failed_save(tmp_path: Path) -> None:
    """on_error continue: the error is told once, and the next save is tried."""
    ours = one_saver(tmp_path / "c", on_error="continue")
    ours.save(pieces(tensors(1), 0, 1, False), TrainState(step=1))
    ours.wait()
    assert ours.has_failed
    (error,) = ours.take_errors()
    assert "No such file" in error
    assert not ours.has_failed
    (tmp_path / "c").mkdir()
    ours.save(pieces(tensors(2), 0, 1, False), TrainState(step=2))
    ours.wait()
    assert verify(tmp_path / "c/step-00000002").step == 2


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A checkpoint is safetensors and JSON, nothing else."""
    path = save(tmp_path / "c", 1)
    names = sorted(p.name for p in path.iterdir())
    assert names == ["manifest.json", "rank-0.json", "rank-0.safetensors", "rank-1.json",
                     "rank-1.safetensors", "state.json"]  # fmt: skip
    for name in names:
        if name.endswith(".json"):
            json.loads((path / name).read_text())


def test_a_half_saved_and_a_half_deleted_one_are_removed(tmp_path: Path) -> None:
    """Only whole checkpoints have a checkpoint's name; what attempts left behind is cleared away."""
    good = save(tmp_path / "c", 1)
    for name in (".step-00000002.tmp", ".step-00000003.deleted.tmp"):
        (tmp_path / "c" / name).mkdir()
        (tmp_path / "c" / name / "rank-0.json").write_text("{}")
    assert retention.find_checkpoints(tmp_path / "c") == [good]
    retention.remove_abandoned(tmp_path / "c")
    assert os.listdir(tmp_path / "c") == ["step-00000001"]


def test_only_rank_0_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits longer than the timeout for a slow rank 0 takes nothing of its part back."""
    real = ShardWriter.write

    def slow(self: ShardWriter, *rest: Any, **options: Any) -> Written:
        if self.rank == 0:
            time.sleep(1.0)
        return real(self, *rest, **options)

    monkeypatch.setattr(ShardWriter, "write", slow)
    path = save(tmp_path / "c", 1, timeout_s=0.3)
    assert verify(path).step == 1


def test_every_failed_save_is_told(tmp_path: Path) -> None:
    """on_error continue: one error does not hide another, and success after it hides neither."""
    ours = one_saver(tmp_path / "c", on_error="continue")
    for step in (1, 2):
        ours.save(pieces(tensors(step), 0, 1, False), TrainState(step=step))
    ours.wait()
    (tmp_path / "c").mkdir()
    ours.save(pieces(tensors(3), 0, 1, False), TrainState(step=3))
    ours.wait()
    assert [error.split(":")[0][-1] for error in ours.take_errors()] == ["1", "2"]
    assert verify(tmp_path / "c/step-00000003").step == 3


def test_the_best_is_the_best_of_those_that_exist(tmp_path: Path) -> None:
    """A save that failed does not hold the place of the best."""
    ours = one_saver(tmp_path, keep_last=1, keep_best=1)
    state = TrainState(scores={"5": 0.1})
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0)):
        state.advance(step, step, 1, 0.5)
        state.metric = metric
        ours.save(pieces(tensors(step), 0, 1, False), state)
    ours.wait()
    assert [step_of(path) for path in retention.find_checkpoints(tmp_path)] == [2, 3]


def test_an_amended_state_counts_and_is_covered(tmp_path: Path) -> None:
    """What an evaluation after a resume adds is believed only whole."""
    path = save(tmp_path / "c", 1)
    state = TrainState(step=1, metric=0.5, evaluation={"eval/loss": 0.5})
    manifest.write_amendment(path, asdict(state))
    assert verify(path) == state
    raw = bytearray((path / "amendment.json").read_bytes())
    raw[20] ^= 1
    (path / "amendment.json").write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=r"amendment.json: it is not what was saved"):
        verify(path)


def test_a_save_has_a_time_limit_of_its_own(tmp_path: Path) -> None:
    """60 s and what the bytes take at 20 MB/s; once measured, ten times what they take at the slowest rate."""
    saver = one_saver(tmp_path / "c", keep_last=2)
    assert saver.limit_s(0) == 60.0
    assert saver.limit_s(2_000_000_000) == pytest.approx(160.0)
    (tmp_path / "c").mkdir()
    with saver:
        saver.save(pieces(tensors(1), 0, 1, sharded=False), TrainState(step=1))
        saver.wait()
        first = saver.limit_s(10**9)
        saver.save(pieces(tensors(2), 0, 1, sharded=False), TrainState(step=2))
        saver.wait()
    assert saver.limit_s(0) == 60.0
    assert saver.limit_s(10**9) >= first  # the slower of the two counts
    assert 60.0 < saver.limit_s(10**8) < saver.limit_s(10**9)


def test_the_final_weights_are_summed_as_they_are_saved(tmp_path: Path) -> None:
    """Checksum, norm and sketch of a run's last checkpoint come from the ranks' manifests: no weight is read."""
    whole = tensors(3)
    store = HashStore()
    (tmp_path / "c").mkdir()

    def work(rank: int) -> None:
        saver = Saver(tmp_path / "c", Checkpoint(), SaveCommit(store, "run-0", rank, 2), rank)
        saver.save(pieces(whole, rank, 2, sharded=True), TrainState(step=5), is_final=True)
        saver.wait()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = tmp_path / "c" / checkpoint_name(5)
    read = save(tmp_path / "d", 3, world=1)  # the same tensors, by one rank, without sums
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    facts, from_files = weight_facts(path), weight_facts(read)
    assert {**facts, "step": 3} == {
        **from_files,
        "norm": pytest.approx(from_files["norm"]),
        "sketch": pytest.approx(from_files["sketch"]),
    }
