"""The best evaluation so far, and whether training ends because none has been better for some time."""

import math

from drumline.checkpoint.state import TrainState
from drumline.plan.model import Plan


def judge_evaluation(state: TrainState, evaluation: dict[str, float], plan: Plan) -> str:
    """Update the best metric and the patience count; returns the reason to stop early, or "".

    Any gain updates the best metric; only a gain above `min_delta` resets the patience count. A value that
    is not finite does neither.
    """
    rule = plan.recipe.early_stopping
    metric = rule.metric if rule else "eval/loss"
    mode = rule.mode if rule and rule.mode else "min"
    value = evaluation[metric]
    state.metric, state.metric_mode = value, mode
    if _gain(value, state.best_metric, mode) > 0:
        state.best_metric, state.is_best = value, True
    if _gain(value, state.patience_metric, mode) > (rule.min_delta if rule else 0.0):
        state.patience_metric, state.evaluations_without_gain = value, 0
    else:
        state.evaluations_without_gain += 1
    return reason_to_stop(state, plan)


def reason_to_stop(state: TrainState, plan: Plan) -> str:
    """The reason for which early stopping ends the run now, or ""."""
    rule = plan.recipe.early_stopping
    if not rule or state.evaluations_without_gain < rule.patience:
        return ""
    return (
        f"early stopping: {rule.metric} has not improved on {state.patience_metric} by more than "
        f"{rule.min_delta:g} for {rule.patience} evaluations"
    )


def _gain(value: float, reference: float | None, mode: str) -> float:
    """How much better than the reference: inf without a reference, -inf for a non-finite value."""
    if not math.isfinite(value):
        return -math.inf
    if reference is None:
        return math.inf
    return reference - value if mode == "min" else value - reference
