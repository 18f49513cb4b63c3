"""Early stopping and the best evaluation: patience, min_delta, mode, and values that are not finite."""

import math
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.checkpoint.state import TrainState
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate
from drumline.train.early_stopping import judge_evaluation


def plan(**rule: Any) -> Plan:
    changes = {"evaluation": {"every_steps": 1}, "early_stopping": rule or None}
    return resolve(validate(tiny_recipe(**changes), "r"))


def run(
    the_plan: Plan, values: list[float], metric: str = "eval/loss"
) -> tuple[list[bool], int | None]:
    """Which evaluations were the best so far, and at which one (from 1) the run stopped."""
    state = TrainState()
    best = []
    for number, value in enumerate(values, start=1):
        state.advance(number, number, 1, 0.5)
        reason = judge_evaluation(state, {metric: value}, the_plan)
        best.append(state.is_best)
        if reason:
            return best, number
    return best, None


@pytest.mark.parametrize(
    ("rule", "values", "best", "stopped"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 2.0], [True, True, False, False], 4),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.0], [True, True, False, True, False], None),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.8, 2.6, 0.1], [True, True, True], 3),
        ({"patience": 3}, [math.nan, 2.0, 1.0, 0.5], [False, True, True, True], None),
        ({"patience": 2}, [math.nan, math.inf], [False, False], 2),
    ],
)
def test_patience_and_best(
    rule: dict[str, Any], values: list[float], best: list[bool], stopped: int | None
) -> None:
    """The best is the best of all; patience ends after n evaluations without a gain above min_delta."""
    assert run(plan(**rule), values) == (best, stopped)


def test_accuracy_is_better_when_larger() -> None:
    """The mode follows the metric."""
    found = run(plan(metric="eval/accuracy", patience=2), [0.1, 0.5, 0.4, 0.3], "eval/accuracy")
    assert found == ([True, True, False, False], 4)


def test_without_a_rule_nothing_stops() -> None:
    """The best is still known, for keep_best."""
    assert run(plan(), [1.0, 2.0, 0.5]) == ([True, False, True], None)
