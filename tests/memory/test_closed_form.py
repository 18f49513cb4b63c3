"""The closed form: states by hand, sharding, and what must grow or shrink."""

from dataclasses import replace
from typing import Any

import pytest

from drumline.architectures.configs import read_shape
from drumline.architectures.gpus import find_gpu
from drumline.architectures.shapes import ModelShape
from drumline.memory.calibration import Row
from drumline.memory.closed_form import Peak, estimate
from drumline.memory.load import Load, StateSize
from drumline.memory.ranges import Device, Totals
from drumline.units import GIB

LLAMA = read_shape("llama", {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
                             "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000})  # fmt: skip
assert isinstance(LLAMA, ModelShape)
BASE = Load(
    shape=LLAMA, per_device=4, sequence_length=1024, ranks=8, nodes=1, shard_ranks=8, strategy="ddp",
    precision="bf16", optimizer_states=(StateSize.uniform(4),) * 2, has_scratch=False, has_scratch_in_a_step=False, checkpointing="none",
    attention="sdpa", chunked_loss=False,
)  # fmt: skip
P = LLAMA.parameters


def peak(**changes: Any) -> Peak:
    load = replace(BASE, **changes)
    gpu = find_gpu("h100-80gb")
    return estimate(load, Device(gpu.memory_bytes, gpu.workspace_bytes, load.ranks))


@pytest.mark.parametrize(
    ("changes", "parameters", "gradients", "optimizer"),
    [
        ({}, 4 * P, 4 * P, 8 * P),
        (
            {"precision": "bf16-pure", "optimizer_states": (StateSize.uniform(2),) * 2},
            2 * P,
            2 * P,
            4 * P,
        ),
        ({"precision": "fp32", "optimizer_states": ()}, 4 * P, 4 * P, 0),
        ({"optimizer_states": (StateSize.uniform(4),)}, 4 * P, 4 * P, 4 * P),
        ({"strategy": "fsdp", "accumulation": 2}, P / 2, P / 2, P),
        ({"strategy": "zero1"}, 2 * P, 0, 1.5 * P),
        ({"strategy": "zero1", "accumulation": 2}, 2 * P, 2 * P, 1.5 * P),
        ({"strategy": "zero1", "precision": "fp32"}, 4 * P, 0, 1.5 * P),
        ({"strategy": "zero2"}, 2 * P, 0, 1.5 * P),
        ({"strategy": "zero2", "accumulation": 2}, 2 * P, P / 2, 1.5 * P),
        ({"strategy": "zero3"}, P / 4, P / 4, 1.5 * P),
        ({"strategy": "zero3", "accumulation": 2}, P / 4, P / 2, 1.5 * P),
        ({"strategy": "fsdp", "shard_ranks": 4, "accumulation": 2}, P, P, 2 * P),
    ],
)
def test_states_by_hand(
    changes: dict[str, Any], parameters: float, gradients: float, optimizer: float
) -> None:
    """Bytes of weights, gradients and Adam's moments, whole or over the shards, where the loss is the peak.

    ZeRO has 16-bit weights and gradients, and fp32 masters beside the moments; stages 1 and 2 have no
    gradients there but those of earlier micro-batches.
    """
    parts = peak(**changes).parts
    assert parts["parameters"] == pytest.approx(parameters, rel=1e-4)
    assert parts["gradients"] == pytest.approx(gradients, rel=1e-4)
    assert parts["optimizer"] == pytest.approx(optimizer, rel=1e-4)


def test_the_loss_is_twelve_bytes_a_logit() -> None:
    """At its backward: log-softmax, its gradient and that of the logits, in fp32; or a chunk of it."""
    logits = {"per_device": 16, "checkpointing": "full"}
    assert peak(**logits).totals.allocated.expected > 12 * 32000 * 16384
    assert peak(**logits, chunked_loss=True).parts["loss"] < 13 * 32000 * 1024


@pytest.mark.parametrize(
    "cheaper",
    [{"checkpointing": "full"}, {"chunked_loss": True}, {"per_device": 2}, {"precision": "bf16-pure"},
     {"strategy": "fsdp"}, {"sequence_length": 512}],
)  # fmt: skip
def test_what_saves_memory_does(cheaper: dict[str, Any]) -> None:
    """Checkpointing, chunks, smaller micro-batches, narrower types and sharding lower the peak."""
    assert peak(**cheaper).totals.device.high < peak().totals.device.high


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure", "fp16"])
def test_ranges_are_ordered_and_the_parts_add_up(precision: str) -> None:
    """low ≤ expected ≤ high; allocated ≤ reserved ≤ device; the parts are the expected allocation."""
    found = peak(precision=precision)
    for three in (found.totals.allocated, found.totals.reserved, found.totals.device):
        assert three.low <= three.expected <= three.high
    assert (
        found.totals.allocated.expected
        <= found.totals.reserved.expected
        <= found.totals.device.expected
    )
    assert sum(found.parts.values()) == pytest.approx(found.totals.allocated.expected, rel=1e-6)


def test_memory_grows_with_per_device() -> None:
    """The solver's search relies on it."""
    highs = [peak(per_device=b).totals.device.high for b in range(1, 40)]
    assert highs == sorted(highs)


def test_foreach_needs_room_for_a_temporary() -> None:
    """At a tiny batch the optimizer step is the peak, and foreach makes it larger."""
    tiny = {"per_device": 1, "sequence_length": 8, "ranks": 1}
    assert peak(**tiny, has_scratch=True, has_scratch_in_a_step=True).phase in (
        "load",
        "optimizer step",
    )  # of the same size
    more = (
        peak(**tiny, has_scratch=True, has_scratch_in_a_step=True).phases["optimizer step"]
        - peak(**tiny).phases["optimizer step"]
    )
    assert more == pytest.approx(4 * P, rel=1e-4)


@pytest.mark.parametrize("held", [0.9, 1.0, 1.1])
def test_what_runs_have_measured_moves_the_limit_of_the_replay(held: float) -> None:
    """On ever smaller cards fits, tight, does not fit; at the limit free blocks are still given back."""
    row = Row(
        "card",
        "fsdp",
        3,
        [1.0] * 3,
        [held * 0.98, held, held * 1.02],
        [10**9, 2 * 10**9, 3 * 10**9],
    )
    load = replace(BASE, strategy="fsdp", per_device=16, checkpointing="full")

    def corrected(capacity: int) -> Totals:
        device = row.applied_to(Device(capacity, 8 << 20, load.ranks))
        return row.correct(estimate(load, device).totals)

    unlimited = corrected(80 * GIB)
    verdicts, least = [], 80 * GIB
    for capacity in range(80 * GIB, GIB, -GIB // 8):
        found = corrected(capacity)
        verdicts.append(found.verdict(capacity))
        if verdicts[-1] != "does_not_fit":
            least = capacity
            assert found.device.low <= found.device.expected <= capacity
    assert list(dict.fromkeys(verdicts)) == ["fits", "tight", "does_not_fit"]
    assert unlimited.allocated.expected < least < unlimited.device.expected
