"""Writes, reads and verifies the manifests of a checkpoint.

    checkpoints/step-00000200/
        rank-0.safetensors   the tensors (or parts of them) that rank 0 owns, each as one dimension
        rank-0.frozen.safetensors  those of them that training has left as they were, if any: written once,
                             then a hard link to the file of the checkpoint before
        rank-0.json          tensor, global shape, boxes (offsets and sizes; `checkpoint/boxes.py`), dtype,
                             size, SHA-256; size of each file and SHA-256 of its header
        state.json           step, samples, tokens, early stopping …
        manifest.json        SHA-256 of the other JSON files and of itself, the resolved recipe; written
                             last, deleted first
        amendment.json       a newer state.json, if an evaluation was completed after a resume; with its
                             own SHA-256

A SHA-256 covers every bit of every file: rank-N.json has those of the tensors and of the safetensors header,
manifest.json those of the JSON files and of itself. Only regular files of exactly these names are read.
Formats that are read too: 3 has no file of frozen weights; 2 in addition the first element of a range
(`start`) in place of boxes.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drumline.checkpoint.files import encode, parse, read_file, read_listed, sha256
from drumline.checkpoint.shards import check_coverage, rank_manifest_name, verify_shard
from drumline.checkpoint.state import TrainState, read_state
from drumline.errors import CheckpointError
from drumline.files import fsync_folder, without_undefined, write_durably

FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, FORMAT_VERSION)
MANIFEST = "manifest.json"
STATE = "state.json"
AMENDMENT = "amendment.json"

_NAME = re.compile(r"^step-(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """The folder name of a step, such as `step-00000200`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else None


def write_manifest(
    folder: Path,
    state: dict[str, Any],
    rank_digests: list[str],
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write state.json, then manifest.json, which completes the checkpoint.

    `recipe`: the resolved recipe, so that the run can be reproduced from the checkpoint alone.
    """
    raw = encode(without_undefined(state))
    write_durably(folder / STATE, raw)
    files = {rank_manifest_name(rank): digest for rank, digest in enumerate(rank_digests)}
    content = {"format": FORMAT_VERSION, "step": state["step"], "ranks": len(rank_digests),
               "files": {**files, STATE: sha256(raw)}, "recipe": recipe}  # fmt: skip
    write_durably(folder / MANIFEST, encode(_with_digest(content)))


def verify(path: Path, ranks: Iterable[int] | None = None) -> TrainState:
    """Verify the state, and every bit of the shards of `ranks` (default: all); returns the state.

    CheckpointError names the first file that differs from what was saved.
    """
    index = read_manifest(path)
    try:
        state = read_state(read_listed(path, STATE, index["files"][STATE]))
    except ValueError as error:
        raise CheckpointError(f"{path / STATE}: {error}") from None
    if state.step != index["step"]:
        raise CheckpointError(f"{path / STATE}: step {state.step}, the manifest says another")
    state = _amended(path, state)
    for rank in range(index["ranks"]) if ranks is None else ranks:
        if rank < index["ranks"]:
            verify_shard(path, rank, index["files"][rank_manifest_name(rank)])
    if ranks is None:
        check_coverage(path, index["ranks"])
    return state


def write_amendment(path: Path, state: dict[str, Any]) -> None:
    """Write amendment.json with the newer state of a published checkpoint, atomically."""
    write_durably(path / AMENDMENT, encode(_with_digest({"state": without_undefined(state)})))
    fsync_folder(path)


def _amended(path: Path, state: TrainState) -> TrainState:
    where = path / AMENDMENT
    if not os.path.lexists(where):
        return state
    try:
        amended = read_state(_self_checked(where)["state"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{where}: it is not what was saved") from None
    if amended.step != state.step:
        raise CheckpointError(f"{where}: step {amended.step} in a checkpoint of {state.step}")
    return amended


def _with_digest(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "sha256": sha256(encode(content))}


def _self_checked(where: Path) -> dict[str, Any]:
    """Read a file that contains the SHA-256 of its own content, verify it, and drop the digest."""
    raw = read_file(where)
    found = parse(where, raw)
    digest = found.pop("sha256", None)
    if sha256(encode(found)) != digest or encode({**found, "sha256": digest}) != raw:
        raise CheckpointError(f"{where}: it is not what was saved")
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json; CheckpointError where its digest, file list or step is wrong."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link, not a checkpoint")
    where = path / MANIFEST
    found = _self_checked(where)
    if found.get("format") not in READABLE_VERSIONS:
        raise CheckpointError(f"{where}: format {found.get('format')}, not {FORMAT_VERSION}")
    ranks, files = found.get("ranks"), found.get("files")
    if not isinstance(files, dict) or not isinstance(ranks, int) or ranks != len(files) - 1:
        raise CheckpointError(f"{where}: {ranks} ranks do not go with its list of files")
    if set(files) != {STATE, *(rank_manifest_name(rank) for rank in range(ranks))}:
        raise CheckpointError(f"{where}: it lists files that no checkpoint has: {sorted(files)}")
    if step_of(path) not in (None, found.get("step")):
        raise CheckpointError(f"{where}: step {found.get('step')} in a folder of another name")
    return found


def digest_of(index: dict[str, Any]) -> str:
    """SHA-256 of a manifest that was read, which covers every bit of its checkpoint but amendments."""
    return sha256(encode(index))
