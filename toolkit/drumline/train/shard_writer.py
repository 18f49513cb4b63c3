"""Writes a rank's files of a checkpoint: what training changes anew, what it leaves as it is only once."""

import hashlib
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drumline.checkpoint.files import encode
from drumline.checkpoint.manifest import checkpoint_name
from drumline.checkpoint.shards import (
    describe_file,
    frozen_name,
    read_frozen,
    shard_name,
    write_rank_manifest,
)
from drumline.checkpoint.weights import WEIGHTS, WeightSums, sum_weights
from drumline.errors import CheckpointError
from drumline.files import apply_umask, fsync_folder
from drumline.train.tensor_shard import TensorShard

_ROW = 1024
"""64-bit words in a row of what a content is summed up by."""
_MIX = ((-0x61C8864680B583EB, 31), (-0x40A7B892E31B1A47, 29))
"""Multipliers, those of splitmix64 as signed numbers, and shifts."""

Shards = dict[str, TensorShard]
Described = dict[str, dict[str, Any]]
"""What a rank's manifest says of the tensors of a file."""


@dataclass(frozen=True)
class Written:
    """The SHA-256 of the rank's manifest, and the bytes of tensors that were written for it."""

    digest: str
    bytes: int


class ShardWriter:
    """Writes one rank's files. Frozen weights have a file of their own, which the next checkpoints link to.

    A weight counts as frozen while it needs no gradient and its content is that of `begin`, so that weights
    which a model changes by itself, such as a momentum encoder's, are saved as any other. `saved_step`: that
    of the checkpoint in `folder` that was loaded.
    """

    def __init__(self, folder: Path, rank: int, saved_step: int) -> None:
        self.rank = rank
        self._before = folder / checkpoint_name(saved_step)
        self._noted: dict[str, int] = {}
        self._frozen: Described = {}

    def begin(self, owned: Shards) -> set[str]:
        """Note the content of the frozen weights, before the first step; returns their names."""
        self._noted = _contents({n: shard for n, shard in owned.items() if shard.frozen})
        return set(self._noted)

    def unchanged(self, owned: Shards) -> Shards:
        """The frozen weights among these whose content is that of `begin`."""
        found = _contents({name: owned[name] for name in self._noted if name in owned})
        return {
            name: owned[name] for name, content in found.items() if content == self._noted[name]
        }

    def published(self, checkpoint: Path) -> None:
        """The checkpoint that was written last is complete: the next one may link to its files."""
        self._before = checkpoint

    def write(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        frozen: Shards,
        owned: Shards,
        *,
        threads: int,
        is_final: bool,
    ) -> Written:
        """Write and fsync tensors, the file of the frozen weights, and the manifest that describes both.

        `tensors`: copies, on the host, of those of `owned` that are not `frozen`. `threads` compute digests.
        `is_final`: also sum the weights up (`checkpoint/weights.py`).
        """
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            described = _described(tensors, owned, pool)
            sums = _sums_of({**tensors, **on_host(frozen)}, owned, pool) if is_final else None
            _write_file(folder / shard_name(self.rank), tensors)
            size = _bytes_of(tensors)
            part, more = self._write_frozen(folder, frozen, pool) if frozen else (None, 0)
            weight_sums = sums().to_plain() if sums else None
            digest = write_rank_manifest(
                folder, self.rank, described(), frozen=part, weight_sums=weight_sums
            )
        fsync_folder(folder)
        return Written(digest, size + more)

    def _write_frozen(
        self, folder: Path, frozen: Shards, pool: ThreadPoolExecutor
    ) -> tuple[dict[str, Any], int]:
        """Link the file of the frozen weights, or write it; what the manifest says of it, bytes written."""
        tensors: dict[str, Tensor] = {}
        if set(self._frozen) != set(frozen):
            tensors = self._copied(frozen)
            self._frozen = _described(tensors, frozen, pool)()
        path = folder / frozen_name(self.rank)
        path.unlink(missing_ok=True)  # what a save that failed has left
        part = self._linked(path)
        if part:
            return part, 0
        tensors = tensors or self._copied(frozen)
        _write_file(path, tensors)
        return describe_file(path, self._frozen), _bytes_of(tensors)

    def _copied(self, frozen: Shards) -> dict[str, Tensor]:
        """Copies of the frozen weights on the host; OSError where one is not what it was at the save's call.

        The loop goes on meanwhile, and the model may change such a weight for the first time now.
        """
        copies = {n: shard.tensor.detach().to("cpu", copy=True) for n, shard in frozen.items()}
        for name, copy in copies.items():
            if int(_content(copy)) != self._noted[name]:
                raise OSError(f"{name} needs no gradient, but changed while it was written")
        return copies

    def _linked(self, path: Path) -> dict[str, Any] | None:
        """Link `path` to the file of the checkpoint before if that holds the same; what is said of it there.

        None where it holds another, or where the file system has no hard links.
        """
        try:
            part = read_frozen(self._before, self.rank)
            if not part or encode(part["tensors"]) != encode(self._frozen):
                return None
            os.link(self._before / path.name, path, follow_symlinks=False)
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_size == part["bytes"]:
                return part
            path.unlink()
        except (OSError, CheckpointError, KeyError, TypeError):
            pass
        return None


def on_host(shards: Shards) -> dict[str, Tensor]:
    """The tensors in host memory, those of the CPU without a copy."""
    return {name: shard.tensor.detach().cpu().contiguous() for name, shard in shards.items()}


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write and fsync tensors, each as one dimension."""
    save_file({name: tensor.reshape(-1) for name, tensor in tensors.items()}, path)
    apply_umask(path, 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _described(
    tensors: dict[str, Tensor], shards: Shards, pool: ThreadPoolExecutor
) -> Callable[[], Described]:
    """Begin to compute what a rank's manifest says of these tensors; the result waits for the digests."""
    digests = {name: pool.submit(_digest, tensor) for name, tensor in tensors.items()}

    def finish() -> Described:
        return {
            name: {
                "shape": list(shards[name].shape),
                "boxes": shards[name].boxes,
                "dtype": _dtype_name(tensor),
                "bytes": tensor.nbytes,
                "sha256": digests[name].result(),
            }
            for name, tensor in tensors.items()
        }

    return finish


def _sums_of(
    tensors: dict[str, Tensor], shards: Shards, pool: ThreadPoolExecutor
) -> Callable[[], WeightSums]:
    """Begin to sum up the weights among these tensors; the result waits for it."""

    def of_one(name: str) -> WeightSums:
        tensor, shard = tensors[name], shards[name]
        raw = _bytes_in(tensor)
        return sum_weights(name, _dtype_name(tensor), list(shard.shape), shard.boxes, raw)

    weights = [name for name in tensors if name.startswith(WEIGHTS)]
    parts = [pool.submit(of_one, name) for name in weights]
    return lambda: sum((part.result() for part in parts), WeightSums())


def _contents(shards: Shards) -> dict[str, int]:
    """Of each tensor a number that changes when its content or the order of its elements does.

    Computed where the tensors are; the host waits once, for all of them.
    """
    sums = [_content(shard.tensor.detach()) for shard in shards.values()]
    if not sums:
        return {}
    return dict(zip(shards, torch.stack(sums).tolist(), strict=True))


def _content(tensor: Tensor) -> Tensor:
    """Σ of the content's 64-bit words, each times a number of its row and one of its column, modulo 2^64."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = raw[: len(raw) // 8 * 8].view(torch.int64)
    whole = words[: len(words) // _ROW * _ROW].view(-1, _ROW)
    rest = torch.cat([words[whole.numel() :], raw[words.numel() * 8 :].long()])
    return _weighted(rest, 1) + _weighted(whole.sum(0), 2) + _weighted(whole.sum(1), 3)


def _weighted(values: Tensor, seed: int) -> Tensor:
    """Σ of the values, each times an odd number that looks random and depends on its place."""
    places = torch.arange(len(values), device=values.device) * 8 + seed
    for multiplier, shift in _MIX:
        places = places * multiplier
        places = places ^ (places >> shift)
    return (values * (places | 1)).sum()


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes_in(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes_in(tensor)).hexdigest()
