"""Final weights in a few numbers: equal exactly where the weights are, and as far apart as they are."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from drumline.checkpoint.boxes import Box
from drumline.checkpoint.files import sha256
from drumline.checkpoint.manifest import verify, write_amendment, write_manifest
from drumline.checkpoint.shards import shard_name, write_rank_manifest
from drumline.checkpoint.state import TrainState
from drumline.checkpoint.weights import distance, sum_weights, weight_facts
from drumline.errors import CheckpointError


def save(folder: Path, tensors: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """A checkpoint of float32 tensors, each cut over the ranks; its facts."""
    folder.mkdir(parents=True)
    digests = []
    for rank in range(ranks):
        parts, entries = {}, {}
        for name, value in tensors.items():
            flat = value.astype(np.float32).ravel()
            size = -(-len(flat) // ranks)
            part = flat[rank * size : (rank + 1) * size]
            if len(part):
                parts[name] = part
                entries[name] = {"shape": list(value.shape), "start": rank * size, "dtype": "float32",
                                 "bytes": part.nbytes, "sha256": sha256(part.tobytes())}  # fmt: skip
        save_file(parts, folder / shard_name(rank))
        digests.append(write_rank_manifest(folder, rank, entries))
    write_manifest(folder, {"step": 7}, digests)
    return weight_facts(folder)


def some_weights(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        "model.a": draw.normal(size=(37, 50)),
        "model.b": draw.normal(size=129),
        "optimizer.a.m": draw.normal(size=9),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_split_over_ranks_does_not_show(tmp_path: Path, ranks: int) -> None:
    """The same weights in any number of shards have the same checksum, norm and sketch."""
    whole = save(tmp_path / "whole", some_weights(1))
    assert save(tmp_path / "cut", some_weights(1), ranks) == whole
    assert whole["elements"] == 37 * 50 + 129
    assert whole["step"] == 7
    values = some_weights(1)
    squares = sum(
        float((values[n].astype(np.float32).astype(float) ** 2).sum())
        for n in ("model.a", "model.b")
    )
    assert whole["norm"] == pytest.approx(squares**0.5, rel=1e-12)


def test_one_bit_shows(tmp_path: Path) -> None:
    """The checksum changes; the distance is that of the one element."""
    weights = some_weights(1)
    before = save(tmp_path / "a", weights)
    weights["model.b"][5] = np.nextafter(np.float32(weights["model.b"][5]), np.float32(9))
    after = save(tmp_path / "b", weights)
    assert before["checksum"] != after["checksum"]
    assert 0 < distance(before, after) < 1e-7


def test_optimizer_state_is_not_weights(tmp_path: Path) -> None:
    """Only `model.*` counts."""
    weights = some_weights(1)
    before = save(tmp_path / "a", weights)
    weights["optimizer.a.m"] += 1
    assert save(tmp_path / "b", weights) == before


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1e-3, 1.0]), shift=st.booleans())
def test_the_sketch_tells_how_far_apart(
    tmp_path_factory: Any, seed: int, size: float, shift: bool
) -> None:
    """Within a factor of 1 ± 0.09 (one sigma) of the true distance, here four sigma.

    Also where every element is off by the same, which sums without signs would add up.
    """
    folder = tmp_path_factory.mktemp("w")
    a, noise = some_weights(seed), some_weights(seed + 1)
    noise = {name: np.ones_like(value) for name, value in noise.items()} if shift else noise
    b = {name: value + size * noise[name] for name, value in a.items()}
    stored = [{n: v.astype(np.float32).astype(float) for n, v in w.items()} for w in (a, b)]
    names = ("model.a", "model.b")
    apart = sum(float(((stored[1][n] - stored[0][n]) ** 2).sum()) for n in names) ** 0.5
    norm = sum(float((stored[0][n] ** 2).sum()) for n in names) ** 0.5
    found = distance(save(folder / "a", a), save(folder / "b", b))
    assert found == pytest.approx(apart / norm, rel=0.36)


def test_other_shapes_are_infinitely_far(tmp_path: Path) -> None:
    """Two models are never nearly equal."""
    other = {"model.a": np.ones((3, 3))}
    assert distance(save(tmp_path / "a", some_weights(1)), save(tmp_path / "b", other)) == float(
        "inf"
    )


def test_an_undefined_metric_damages_no_checkpoint(tmp_path: Path) -> None:
    """0/0, as F1 of no entities, is kept as undefined, and an infinite loss as none."""
    state = TrainState(step=7, loss=math.inf, evaluation={"eval/loss": 0.5, "eval/f1": math.nan})
    folder = tmp_path / "step-7"
    save(folder, {"model.a": np.ones(3)})
    (entry,) = folder.glob("rank-*.json") if list(folder.glob("rank-*.json")) else [None]
    write_manifest(folder, dataclasses.asdict(state), [sha256(entry.read_bytes())])
    found = verify(folder)
    assert found.loss is None
    assert found.evaluation and math.isnan(found.evaluation.pop("eval/f1"))
    assert found.evaluation == {"eval/loss": 0.5}
    state.evaluation = {"eval/f1": math.nan}
    write_amendment(folder, dataclasses.asdict(state))
    amended = verify(folder).evaluation
    assert amended and math.isnan(amended["eval/f1"])


def test_weights_that_are_not_finite_damage_nothing(tmp_path: Path) -> None:
    """The checkpoint is sound, and its facts say why there is no norm."""
    sums = sum_weights("a", "float32", [2], ((Box((0,), (2,))),), np.array([1.0, np.inf], dtype="<f4").view(np.uint8))  # fmt: skip
    folder = tmp_path / "step-7"
    folder.mkdir()
    save_file({}, folder / shard_name(0))
    digest = write_rank_manifest(folder, 0, {}, weight_sums=sums.to_plain())
    write_manifest(folder, {"step": 7}, [digest])
    assert verify(folder).step == 7
    with pytest.raises(CheckpointError, match="some of its weights are not finite"):
        weight_facts(folder)
