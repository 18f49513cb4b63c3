"""The state in a checkpoint besides tensors."""

import math
from dataclasses import dataclass, field
from typing import Any

MOST_SCORES = 100


@dataclass
class TrainState:
    """What a run needs besides tensors to resume exactly where it stopped.

    `scores`: step -> metric of the `MOST_SCORES` best saved steps. `recent_losses`: the losses against which
    a spike is measured. `noise`: the noise-scale pairs of the last steps (`plan/noise.py`). `evaluation`:
    the last result. `evaluation_due`: this step's evaluation has not been made yet. `base`: fingerprint of
    the pretrained weights under an adapter. `slot`: of the next sample, and `own_samples`: consumed of
    these data, where a run has begun from another one on other data; `rows`: fingerprint of the
    training rows. All three are None in older checkpoints.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    loss: float | None = None
    training_sha256: str = ""
    fingerprint: str | None = None
    evaluation: dict[str, float] | None = None
    evaluation_due: bool = False
    metric: float | None = None
    metric_mode: str = "min"
    best_metric: float | None = None
    is_best: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    patience_metric: float | None = None
    evaluations_without_gain: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    noise: list[tuple[float, float]] = field(default_factory=list)
    loss_scale: dict[str, Any] | None = None
    base: str = ""
    slot: int | None = None
    own_samples: int | None = None
    rows: str | None = None

    def advance(self, step: int, samples: int, tokens: int, loss: float) -> None:
        """Advance to `step`; `samples`: consumed in total, `tokens`: label tokens of this step."""
        self.step, self.samples, self.tokens, self.loss = step, samples, self.tokens + tokens, loss
        self.metric, self.is_best, self.evaluation_due = None, False, False


def read_state(plain: Any) -> TrainState:
    """The state from plain data; ValueError for a field that is missing, unknown or of another type."""
    from pydantic import TypeAdapter, ValidationError

    if isinstance(plain, dict) and isinstance(plain.get("evaluation"), dict):
        plain = {**plain, "evaluation": _with_undefined(plain["evaluation"])}
    unknown = (
        set(plain) - set(TrainState.__dataclass_fields__) if isinstance(plain, dict) else {"it"}
    )
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: unknown")
    try:
        return TypeAdapter(TrainState).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from None


def _with_undefined(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The result of an evaluation with NaN for None: a metric of 0/0 is undefined."""
    return {name: math.nan if value is None else value for name, value in evaluation.items()}


def badness(state: TrainState, metric: float) -> float:
    """The metric with its sign set so that less is better."""
    return -metric if state.metric_mode == "max" else metric
