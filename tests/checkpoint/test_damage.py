"""Damage and malice: every flipped bit, truncation, link and lie is found and its file named."""

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from savers import save

from drumline.checkpoint.files import encode, sha256
from drumline.checkpoint.manifest import MANIFEST, verify
from drumline.checkpoint.retention import newest_sound, set_aside
from drumline.checkpoint.shards import read_entries
from drumline.errors import CheckpointError, CheckpointUnreadable

FILES = ["manifest.json", "state.json", "rank-0.json", "rank-1.json", "rank-0.safetensors",
         "rank-1.safetensors", "rank-0.frozen.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, with a frozen weight."""
    return save(tmp_path_factory.mktemp("sound") / "c", 2, frozen=("model.a",))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(sound: Path, tmp_path: Path, name: str) -> None:
    """One bit of any file, at every one of 400 places or all of a small file: found, file named."""
    path = tmp_path / sound.name
    shutil.copytree(sound, path)
    raw = (path / name).read_bytes()
    bits = range(8 * len(raw))
    for bit in bits if len(bits) <= 400 else random.Random(1).sample(bits, 400):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError) as error:
            verify(path)
        assert f"{path / name}:" in str(error.value), (bit, error.value)
    (path / name).write_bytes(raw)
    assert verify(path).step == 2


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(sound: Path, tmp_path: Path, name: str) -> None:
    """Cut anywhere, or gone: found, file named."""
    path = tmp_path / sound.name
    shutil.copytree(sound, path)
    raw = (path / name).read_bytes()
    for size in [0, 7, 8, 9, *range(10, len(raw), max(1, len(raw) // 50)), len(raw) - 1]:
        (path / name).write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=name):
            verify(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: No such file"):
        verify(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that lies and yet is true to itself, as only malice writes it."""
    content = json.loads((path / MANIFEST).read_bytes())
    del content["sha256"]
    change(content)
    content["sha256"] = sha256(encode(content))
    (path / MANIFEST).write_bytes(encode(content))


def test_a_tensor_in_two_files_is_refused(sound: Path, tmp_path: Path) -> None:
    """Which of the two is meant, nobody can tell; a load finds it, too."""
    path = tmp_path / sound.name
    shutil.copytree(sound, path)
    describe(path, lambda d: d["tensors"].update(d["frozen"]["tensors"]))
    with pytest.raises(CheckpointError, match=r"rank-0.json: tensor model.a: it is in two files"):
        read_entries(path, 0)


def describe(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same for what rank 0 holds."""
    content = json.loads((path / "rank-0.json").read_bytes())
    change(content)
    raw = encode(content)
    (path / "rank-0.json").write_bytes(raw)
    rewrite(path, lambda index: index["files"].update({"rank-0.json": sha256(raw)}))


def grow_header(path: Path) -> None:
    raw = bytearray((path / "rank-0.safetensors").read_bytes())
    raw[:8] = (1 << 60).to_bytes(8, "little")
    (path / "rank-0.safetensors").write_bytes(bytes(raw))


def link(path: Path, name: str) -> None:
    (path / name).rename(path.parent / f"elsewhere-{name}")
    (path / name).symlink_to(path.parent / f"elsewhere-{name}")


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard that is a link": (lambda p: link(p, "rank-0.safetensors"), "rank-0.safetensors: cannot be read: is a symbolic link"),
    "a state that is a link": (lambda p: link(p, "state.json"), "state.json: cannot be read: is a symbolic link"),
    "a pipe": (lambda p: [(p / "state.json").unlink(), os.mkfifo(p / "state.json")], "is not a regular file"),
    "a folder": (lambda p: [(p / "state.json").unlink(), (p / "state.json").mkdir()], "is not a regular file"),
    "a pickle": (lambda p: (p / "rank-0.safetensors").write_bytes(pickle.dumps(Bomb())), "rank-0.safetensors: "),
    "a huge header": (grow_header, "not a safetensors file"),
    "a path upwards": (lambda p: rewrite(p, lambda m: m["files"].update({"../../x": m["files"].pop("rank-1.json")})),
                       "lists files that no checkpoint has"),
    "an absolute path": (lambda p: rewrite(p, lambda m: m["files"].update({"/etc/x": m["files"].pop("state.json")})),
                         "lists files that no checkpoint has"),
    "a rank too many": (lambda p: rewrite(p, lambda m: m.update(ranks=10**18)), "do not go with its list"),
    "no ranks": (lambda p: rewrite(p, lambda m: m.update(ranks=0)), "do not go with its list"),
    "a lie about the size": (lambda p: describe(p, lambda d: d.update(bytes=12)), "bytes, 12 were saved"),
    "another step": (lambda p: rewrite(p, lambda m: m.update(step=7)), "manifest.json: step 7"),
    "a later format": (lambda p: rewrite(p, lambda m: m.update(format=9)), "format 9"),
    "a tensor in two files": (lambda p: describe(p, lambda d: d["tensors"].update(d["frozen"]["tensors"])), "does not hold"),
    "a tensor that is not there": (lambda p: describe(p, lambda d: d["tensors"].pop("model.c")), "does not hold"),
    "another rank's shard": (lambda p: shutil.copy(p / "rank-1.safetensors", p / "rank-0.safetensors"), "rank-0.s"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_malice_is_refused(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """Nothing outside the checkpoint is read, nothing is executed, nothing huge is allocated."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / sound.name
    shutil.copytree(sound, path)
    harm, words = ATTACKS[attack]
    harm(path)
    with pytest.raises(CheckpointError, match=words):
        verify(path)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_that_is_a_link_is_refused(sound: Path, tmp_path: Path) -> None:
    """The folder itself must be one."""
    (tmp_path / sound.name).symlink_to(sound)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        verify(tmp_path / sound.name)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_one_is_named_and_the_one_before_is_read(tmp_path: Path, name: str) -> None:
    """A reader says in one line which file is bad, takes the one before, and renames nothing."""
    save(tmp_path / "c", 1, frozen=("model.a",))
    newest = save(tmp_path / "c", 2, frozen=("model.a",))
    raw = bytearray((newest / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (newest / name).write_bytes(bytes(raw))
    said: list[str] = []
    found = newest_sound(tmp_path / "c", said.append)
    assert found
    assert found[1].step == 1
    assert len(said) == 1
    assert str(newest / name) in said[0]
    assert (newest / name).read_bytes() == bytes(raw)
    aside = [set_aside(newest).name, set_aside(save(tmp_path / "c", 2)).name]
    assert aside == ["step-00000002.bad-1", "step-00000002.bad-2"]


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTCONN]
)
@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_not_called_damaged(
    sound: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Whatever a file system answers, of any file: CheckpointUnreadable. The answer is planted in os.open.

    Only `test_readers.py` has real ones (a permission); no disk here gives the others.
    """
    real = os.open

    def failing(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path) == str(sound / name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(CheckpointUnreadable, match=f"{name}: cannot be read"):
        verify(sound)
    with pytest.raises(CheckpointUnreadable):
        newest_sound(sound.parent, lambda line: None)


def test_a_checkpoint_whose_folder_is_gone_is_not_called_damaged(sound: Path) -> None:
    """Deleted meanwhile, or its mount is gone."""
    with pytest.raises(CheckpointUnreadable):
        verify(sound.with_name("step-00000003"))
