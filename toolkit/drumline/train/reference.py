"""The reference of a preference run: log-probabilities of the model before training, computed once.

They are kept in the cache, under a key made of the model's weights and the rows, so that a resumed run, other
splits, and other runs from the same model read them. Rows that are not computed yet are NaN.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from drumline.data.cache import cache_root
from drumline.data.factory import factory_files
from drumline.data.rows import Rows
from drumline.data.tasks.base import REFERENCE
from drumline.errors import CheckpointError, DataError
from drumline.phases import Phase
from drumline.plan.model import Plan
from drumline.recipe.section import without_later_defaults
from drumline.train.engines import Engine
from drumline.train.forwards import forward_all
from drumline.train.models.build import weights_fingerprint
from drumline.train.objectives.preference import Preference
from drumline.train.step_reduce import is_shared
from drumline.train.watch import Watch

FORWARDS_PER_SAVE = 256
"""Forwards after which what was computed is written, so that a run that is stopped loses little."""

_DO_NOT_MATTER = (
    "source",
    "path",
    "name",
    "revision",
    "factory",
    "attention",
    "activation_checkpointing",
    "activation_offload",
    "sync_batchnorm",
    "compile",
    "frozen",
    "adapter",
    "neftune_alpha",
)
"""Keys of the model that change none of its outputs before training, or that the weights stand for."""


def needs_reference(plan: Plan) -> bool:
    """Whether the run's losses need stored log-probabilities of the model before training."""
    return plan.recipe.objective.reference == "stored"


def attach_reference(
    plan: Plan, engine: Engine, parts: dict[str, Rows], watch: Watch, *, is_begun: bool = False
) -> None:
    """Add the reference's log-probabilities, float32 [N, 2], to the rows of each part, by its name.

    A collective. They are computed with the engine's weights where the cache lacks them, which are those
    before training unless `is_begun`: CheckpointError then. Raises `Asked` when any rank was asked to stop.
    """
    objective = engine.module.objective
    assert isinstance(objective, Preference)
    key = reference_key(plan, parts["train"].manifest.fingerprint, objective.mean)
    for part, rows in parts.items():
        path = cache_root() / "reference" / key / f"{part}.npy"
        values = _read(path, len(rows))
        if is_begun and np.isnan(values).any():
            raise CheckpointError(
                f"{path}: the log-probabilities of the reference are gone, and the model has been trained "
                "since. Nearest: put the file back, or start the run anew"
            )
        _compute(plan, engine, rows, values, path, watch)
        rows.attach(REFERENCE, values)


def reference_key(plan: Plan, rows: str, is_mean: bool) -> str:
    """SHA-256 of all that the values follow from: the weights before training, the rows, the precision.

    `rows`: the fingerprint of the prepared data. `is_mean`: values are means over tokens, not sums.
    """
    recipe = plan.recipe
    model = without_later_defaults(recipe.model)
    code = factory_files(filter(None, (recipe.model.factory, *recipe.model.edits)), recipe.project)
    start = plan.start
    weights = weights_fingerprint(recipe)
    identity: dict[str, Any] = {
        "model": {key: value for key, value in model.items() if key not in _DO_NOT_MATTER},
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
        "weights": weights,
        # What is not in the files, the model is given anew: by its initialisation, or by edits.
        "seed": None if weights and not recipe.model.edits else recipe.seed,
        "start": start and [start.training_sha256, start.step, start.sha256],
        "adapter": start and recipe.model.adapter and recipe.model.adapter.model_dump(),
        "rows": rows,
        "precision": recipe.precision,
        "is_mean": is_mean,
    }
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path, count: int) -> NDArray[np.float32]:
    """What is stored, float32 [count, 2], as rank 0 finds it; NaN where nothing is."""
    values = np.full((count, 2), np.nan, dtype=np.float32)
    if dist.get_rank() == 0 and path.is_file():
        try:
            stored = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            stored = values
        if stored.shape == values.shape and stored.dtype == values.dtype:
            values = stored
    if is_shared():
        dist.broadcast(torch.from_numpy(values), src=0)
    return values


def _compute(
    plan: Plan,
    engine: Engine,
    rows: Rows,
    values: NDArray[np.float32],
    path: Path,
    watch: Watch,
) -> None:
    """Fill in the rows that are NaN, the longest first, and write them from time to time."""
    missing = np.flatnonzero(np.isnan(values).any(axis=1))
    missing = missing[np.argsort(-rows.lengths()[missing], kind="stable")]
    per_device = plan.batch.per_device
    at_once = FORWARDS_PER_SAVE * per_device * plan.mesh.data_ranks
    for first in range(0, len(missing), at_once):
        indices = missing[first : first + at_once]
        found = torch.zeros((len(indices), 2), device=engine.device)
        for start, stop, part in forward_all(
            plan, engine, rows, indices, per_device, watch, Phase.MEASURING, "reference_log_probs"
        ):
            found[start:stop] = part[: stop - start].float()
        if is_shared():
            dist.all_reduce(found)
            dist.broadcast(found, src=0)
        values[indices] = _finite(found, indices)
        if dist.get_rank() == 0:
            _write(path, values)


def _finite(found: Tensor, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    computed = found.cpu().numpy()
    odd = indices[~np.isfinite(computed).all(axis=1)]
    if len(odd):
        raise DataError(
            f"the model's log-probability of row {odd[0]:,} of the prepared data is not finite before "
            "training. Nearest: look at the row with `drumline data`, and at the model's weights"
        )
    return np.asarray(computed, dtype=np.float32)


def _write(path: Path, values: NDArray[np.float32]) -> None:
    """Replace the file in one rename; other runs may write the same file at the same time.

    Where the cache cannot be written, the run goes on, and whoever needs the values computes them again.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}", flush=True)
        temporary.unlink(missing_ok=True)
