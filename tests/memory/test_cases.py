"""Plans that were wrong, with what really happened: data/cases/, from logs and tables that others published.

mistral-199, powerlm-275: allocated peaks and nvidia-smi of foundation-model-stack's fms-acceleration
benchmarks. llama8b-345: nvidia-smi of a run. mpt13b-145, mpt350m-201: rows of llm-foundry's table of runs. The
others are plans whose figures were absurd.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from drumline.plan.model import MemoryFacts
from drumline.plan.resolve import resolve
from drumline.recipe.load import load_recipe

FOLDER = Path(__file__).parent / "data/cases"


def memory_of(name: str, *overrides: str) -> MemoryFacts:
    return resolve(load_recipe(str(FOLDER / f"{name}.yaml"), list(overrides))).memory


@dataclass(frozen=True)
class Ran:
    """What a run needed, in bytes: its peak of allocated ones, and all that the device had in use."""

    allocated: float | None = None
    device: float | None = None


RAN = {
    "mistral-199": Ran(allocated=36.226e9, device=46.54e9),
    "powerlm-275": Ran(device=50.0e9),
    "llama8b-345": Ran(device=83.1e9),
    "mpt13b-145": Ran(),
    "gpt2xl-dropout": Ran(),
    "bert-594": Ran(),
}
"""bert-594 is said to need at most 12.4 GB of a V100-32GB and fitted, but its run measured 15.7: 1.41 of them the
context of its CUDA, 1.34 gradients that its loop kept through the forward (ours then expects 12.9, context and all),
and 1.5 that no library of today explains."""


@pytest.mark.parametrize("name", RAN)
def test_what_ran_is_not_refused(name: str) -> None:
    """It may be tight; allocated bytes are right within 5 %, and the device's bytes within their range."""
    memory, ran = memory_of(name), RAN[name]
    assert memory.verdict in ("fits", "tight")
    assert memory.allocated and memory.device and memory.capacity
    if ran.allocated:
        assert memory.allocated.expected == pytest.approx(ran.allocated, rel=0.05)
    if ran.device:
        assert memory.device.low <= ran.device <= memory.device.high


def test_a_model_that_others_ran_can_be_stated() -> None:
    """MPT 350M as GPT-2 with the exact GELU, and a loss that never holds fp32 logits, as llm-foundry's does."""
    stated = ["model.config.activation_function=gelu", "loss.chunked=true"]
    assert memory_of("mpt350m-201", *stated).verdict in ("fits", "tight")


@pytest.mark.parametrize("gpus", [64, 512])
def test_zero_3_of_70b_is_beside_fsdp(gpus: int) -> None:
    """ZeRO-3 with 16-bit weights needs less than FSDP2 with fp32 shards, and both fit."""
    over = [f"batch.gpus={gpus}", "batch.effective=512", "batch.accumulation=null"]
    zero = memory_of("llama70b-zero3", *over)
    fsdp = memory_of("llama70b-zero3", *over, "strategy.name=fsdp", "launch.launcher=torchrun")
    assert zero.allocated
    assert fsdp.allocated
    assert zero.verdict == fsdp.verdict == "fits"
    assert 0.5 * fsdp.allocated.expected < zero.allocated.expected < fsdp.allocated.expected


def test_more_ranks_never_need_more_for_experts() -> None:
    """Mixtral-8x7B on 8 to 1,024 H100, also where the ranks divide no width: it fits from 16 on."""
    needs, verdicts = [], []
    for gpus in (8, 16, 24, 40, 64, 72, 96, 104, 256, 512, 1024):
        memory = memory_of("mixtral-512", f"batch.gpus={gpus}")
        assert memory.allocated
        needs.append(memory.allocated.expected)
        verdicts.append(memory.verdict)
    assert needs == sorted(needs, reverse=True)
    assert verdicts[0] == "does_not_fit"
    assert set(verdicts[1:]) == {"fits"}


def test_deepspeeds_own_bf16_has_16_bit_weights() -> None:
    """ds-580, a GPT-2 of 254M under ZeRO-3 on 4: 2 + 2 bytes a parameter and 12 of masters and moments."""
    plan = resolve(load_recipe(str(FOLDER / "ds-580.yaml"), []))
    share = (plan.cost.parameters or 0) / 4
    parts = plan.memory.parts
    assert parts["parameters"] + parts["gradients"] == pytest.approx(4 * share, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(12 * share, rel=1e-3)
    assert plan.memory.verdict == "fits"


def test_a_tight_plan_says_by_how_much() -> None:
    """Expected to fit, not at its high end: no refusal, but a warning with the difference."""
    plan = resolve(load_recipe(str(FOLDER / "mpt13b-145.yaml"), []))
    memory = plan.memory
    assert (memory.verdict, memory.fits) == ("tight", True)
    assert memory.device and memory.capacity
    assert memory.device.expected <= memory.capacity < memory.device.high
    over = (memory.device.high - memory.capacity) / 2**30
    assert any(f"{over:.3g} GiB above" in warning for warning in plan.warnings), plan.warnings


def test_the_verdict_turns_with_the_capacity() -> None:
    """The same allocations on smaller cards: it fits, is tight, and does not fit, in this order."""
    verdicts = []
    for gib in range(76, 28, -1):
        card = f"cluster.gpu={{name: mine, memory_gib: {gib}, bf16_tflops: 312}}"
        verdicts.append(memory_of("mistral-199", card).verdict)
    assert list(dict.fromkeys(verdicts)) == ["fits", "tight", "does_not_fit"]
