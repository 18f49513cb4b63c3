"""The rates that `plan` shows are those of the run, for any schedule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.plan.schedule import SCHEDULES, Curve, rate, rate_facts
from drumline.plan.steps import Clock


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    unit=st.sampled_from(["step", "epoch"]),
    total=st.integers(1, 80),
    warmup=st.floats(0, 1),
    samples=st.integers(1, 300),
    remainder=st.sampled_from(["keep", "carry"]),
    cycles=st.integers(1, 5),
    least=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_first_highest_and_last_are_found(
    name: str,
    unit: str,
    total: int,
    warmup: float,
    samples: int,
    remainder: str,
    cycles: int,
    least: float,
) -> None:
    """As found by asking for every step, also where the rate holds within an epoch."""
    clock = Clock(samples, 10, remainder)  # type: ignore[arg-type]
    curve = Curve(name=name, base_lr=1.0, peak_lr=1.0, min_lr_ratio=least, total=total,
                  warmup_steps=round(warmup * total), unit=unit, cycles=cycles, power=2.0,  # type: ignore[arg-type]
                  decay_steps=max(1, total // 5), start_ratio=0.04,
                  milestones=[(max(1, total // 2), 0.5)])  # fmt: skip
    rates = [rate(curve, step, clock) for step in range(1, total + 1)]
    facts = rate_facts(curve, clock)
    assert (facts.first, facts.last) == (rates[0], rates[-1])
    assert facts.highest == pytest.approx(max(rates), rel=1e-12)
    assert rates[facts.highest_step - 1] == pytest.approx(max(rates), rel=1e-12)
