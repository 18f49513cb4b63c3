"""Every family at three shapes, three precisions and three strategies: the closed form beside the trace."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drumline.memory.recording import Traced
from drumline.plan.model import Plan
from drumline.recipe.load import merge
from drumline.session.planning import with_trace
from drumline.trace.rehearse import rehearse
from drumline.units import GIB
from memory.plans import LOOKS_AT_VALUES, SMALL, small_plan

SHAPES: list[dict[str, Any]] = [
    {"b": 2, "length": 128},
    {"b": 1, "length": 384},
    {"b": 5, "length": 96, "k": 2},
]
PRECISIONS = ("bf16", "fp32", "bf16-pure")
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": {"name": "ddp"}},
    {"strategy": {"name": "fsdp"}, "gpus": 8},
    {"strategy": {"name": "fsdp"}, "gpus": 16, "model": {"activation_checkpointing": "full"}},
]


def _trace(plan: Plan, architecture: str) -> Traced:
    return rehearse(plan, fake=architecture not in LOOKS_AT_VALUES).traced()


@dataclass(frozen=True)
class Cell:
    """One combination: its plan by the closed form, and the trace of the same step."""

    architecture: str
    sections: dict[str, Any]
    plan: Plan
    trace: Traced

    @property
    def error(self) -> float:
        """Allocated bytes of the closed form over those of the trace, less one."""
        phases = self.plan.memory.phases
        return (max(phases.values()) - self.plan.memory.parts["workspace"]) / self.trace.peak - 1

    def verdicts(self, share: float) -> tuple[str, str]:
        """By the closed form and by the trace, on a card with this share of the bytes that are needed.

        The share is of the trace's bytes. Context and NCCL come on top, as expected where the share is too
        small, else at their largest.
        """
        roomy = self._on_a_card_of(1000 * GIB).memory
        device, reserved = roomy.device, roomy.reserved
        assert device
        assert reserved
        expected = device.expected - reserved.expected
        outside = expected if share < 1 else device.high - reserved.high
        plan = self._on_a_card_of(share * self.trace.peak + outside + roomy.parts["workspace"])
        return plan.memory.verdict, with_trace(plan, self.trace).memory.verdict

    def _on_a_card_of(self, size: float) -> Plan:
        card = {"name": "made-up", "memory_gib": size / GIB, "bf16_tflops": 100.0}
        return small_plan(self.architecture, **merge(self.sections, {"cluster": {"gpu": card}}))


def diagonal() -> list[dict[str, Any]]:
    """Three combinations, in which every shape, precision and strategy is there once."""
    return [
        {"precision": precision, **STRATEGIES[number], **SHAPES[(2 * number) % len(SHAPES)]}
        for number, precision in enumerate(PRECISIONS)
    ]


def cells(architecture: str, is_all: bool) -> Iterator[Cell]:
    """All 27 combinations, or three in which each shape, precision and strategy is there once.

    They are of nine in which each two of them meet once; the next family has three others.
    """
    turn = list(SMALL).index(architecture)
    for row, precision in enumerate(PRECISIONS):
        for column, strategy in enumerate(STRATEGIES):
            for number, shape in enumerate(SHAPES):
                meets_once = number == (row + column) % len(SHAPES)
                if is_all or (meets_once and not (row - column + turn) % len(SHAPES)):
                    sections = {"precision": precision, **strategy, **shape}
                    plan = small_plan(architecture, **sections)
                    yield Cell(architecture, sections, plan, _trace(plan, architecture))
