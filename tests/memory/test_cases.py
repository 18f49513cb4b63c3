"""Plans that were wrong, with what really happened: data/cases/, from logs and tables that others published.

mistral-199, powerlm-275: allocated peaks and nvidia-smi of foundation-model-stack's fms-acceleration
benchmarks. llama8b-345: nvidia-smi of a run. mpt13b-145: a row of llm-foundry's table of runs.
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
}


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
