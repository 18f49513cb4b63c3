"""Compares two runs step by step: identical, equal within a tolerance, or diverged, and why. Pure."""

from dataclasses import dataclass, field
from typing import Any, Literal

from drumline.checkpoint.weights import distance
from drumline.compare.differences import (
    Pair,
    code_differences,
    environment_differences,
    input_differences,
    recipe_differences,
)
from drumline.compare.logged import Logged
from drumline.plan import order
from drumline.plan.steps import Clock, Place, whole_samples

TOLERANCE = 1e-5
_RATE_TOLERANCE = 1e-9
"""Learning rates depend only on the step, but another Python version may round a cosine differently."""

_CAUSES = {
    "samples": (
        "seed",
        "data",
        "batch.effective",
        "batch.remainder",
        "batch.ramp",
        "duration",
        "start_from",
    ),
    "learning rate": ("optimizer", "schedule", "duration", "batch.effective"),
    "weight": ("data", "batch.effective", "batch.remainder", "batch.weighting"),
}
"""Recipe keys that can cause each kind of first difference; for other kinds, such as the loss, any key."""


@dataclass(frozen=True)
class Difference:
    """The first step at which two runs differ, what differs, and both values."""

    step: int
    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """`loss_error`: largest |a − b| / max(1, |a|); `weights_error`: ‖a − b‖ / ‖a‖ of the final weights."""

    verdict: Literal["identical", "equal", "diverged"]
    tolerance: float
    steps: int
    loss_error: float
    weights_error: float | None
    first: Difference | None
    because: list[str]
    recipe: dict[str, Pair] = field(default_factory=dict)
    inputs: dict[str, Pair] = field(default_factory=dict)
    code: dict[str, Pair] = field(default_factory=dict)
    environment: dict[str, Pair] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The verdict, on one line."""
        if self.verdict == "diverged":
            assert self.first
            first = self.first
            what = f"{first.what} {_shown(first.a)} against {_shown(first.b)}"
            return f"diverged at step {first.step:,} because {'; '.join(self.because)} ({what})"
        checked = f"{self.steps:,} steps" + (
            "" if self.weights_error is None else " and the final weights"
        )
        if self.verdict == "identical":
            return f"identical: {checked}, bit for bit"
        weights = "" if self.weights_error is None else f", weights within {self.weights_error:.1e}"
        return f"equal within {self.tolerance:g}: {checked} (loss within {self.loss_error:.1e}{weights})"


def compare(a: Logged, b: Logged, tolerance: float = TOLERANCE) -> Comparison:
    """Compare all common steps, then the final weights if both runs have them for the same step."""
    until = min((run.until for run in (a, b) if run.until is not None), default=None)
    theirs = {line["step"]: line for line in b.steps}
    pairs = [
        (line, theirs[line["step"]])
        for line in a.steps
        if line["step"] in theirs and (until is None or line["step"] <= until)
    ]
    recipe = recipe_differences(a.recipe, b.recipe)
    inputs = input_differences(a.record, b.record)
    code = code_differences(a.record, b.record)
    environment = environment_differences(a.record, b.record)
    first = next(filter(None, (_first_difference(x, y, tolerance) for x, y in pairs)), None)
    weights = _weights_error(a, b)
    if first is None and weights is not None and weights > tolerance:
        step = a.record["weights"]["step"]
        first = Difference(step, "final weights", 0.0, weights)
    if first is None and not pairs and weights is None:
        first = Difference(0, "steps", len(a.steps), len(b.steps))
        because = ["they have no step in common"]
    else:
        because = _because(first, recipe, inputs, code, environment) if first else []
    bitwise = first is None and all(_is_same(x, y) for x, y in pairs) and not weights
    return Comparison(
        verdict="diverged" if first else "identical" if bitwise else "equal",
        tolerance=tolerance,
        steps=len(pairs),
        loss_error=max((_loss_error(x, y) for x, y in pairs), default=0.0),
        weights_error=weights,
        first=first,
        because=because,
        recipe=recipe,
        inputs=inputs,
        code=code,
        environment=environment,
    )


def step_indices(run: Logged, step: int) -> list[int] | None:
    """Sample indices of a step, in slot order; None if the record lacks the number of samples."""
    data = run.record.get("data") or {}
    samples, mixture = data.get("samples"), data.get("mixture") or []
    recipe = run.recipe
    if not samples:
        return None
    epochs, batch = recipe["duration"].get("epochs"), recipe["batch"]
    start = (run.record.get("plan") or {}).get("start") or {}
    clock = Clock(
        samples,
        batch["effective"],
        batch["remainder"],
        whole_samples(samples, epochs) if epochs else None,
        Place(**start.get("place", {})),
        tuple((stage["until_step"], stage["effective"]) for stage in batch.get("ramp", ())),
    )
    first, end = clock.slots(step)
    sources = [(own["rows"], own["share"]) for own in mixture]
    return order.slot_indices(recipe["seed"], samples, first, end, sources).tolist()  # type: ignore[no-any-return]


def _first_difference(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> Difference | None:
    step = a["step"]
    if a["digest"] != b["digest"]:
        return Difference(step, "samples", a["digest"], b["digest"])
    if _relative(a["lr"], b["lr"]) > _RATE_TOLERANCE:
        return Difference(step, "learning rate", a["lr"], b["lr"])
    if a["weight"] != b["weight"]:
        return Difference(step, "weight", a["weight"], b["weight"])
    if a.get("skipped", False) != b.get("skipped", False) and "skipped" in a and "skipped" in b:
        return Difference(step, "skipped", a["skipped"], b["skipped"])
    if (a["loss"] is None) != (b["loss"] is None) or _loss_error(a, b) > tolerance:
        return Difference(step, "loss", a["loss"], b["loss"])
    return None


def _is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in ("digest", "lr", "loss", "grad_norm"))


def _loss_error(a: dict[str, Any], b: dict[str, Any]) -> float:
    if a["loss"] is None or b["loss"] is None:
        return 0.0
    return float(abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])))


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _weights_error(a: Logged, b: Logged) -> float | None:
    ours, theirs = a.record.get("weights"), b.record.get("weights")
    if not ours or not theirs or ours["step"] != theirs["step"]:
        return None
    return distance(ours, theirs)


def _because(
    first: Difference,
    recipe: dict[str, Pair],
    inputs: dict[str, Pair],
    code: dict[str, Pair],
    environment: dict[str, Pair],
) -> list[str]:
    """Recorded differences that can have caused `first`, most likely first."""
    keys = _CAUSES.get(first.what)
    named = {k: v for k, v in recipe.items() if keys is None or k.startswith(keys)}
    groups: list[dict[str, Pair]] = [named]
    if first.what != "learning rate":
        groups.append(inputs)
    if first.what in ("loss", "final weights", "skipped"):
        groups += [code, environment]
    found = [
        f"{name} differs" if (a, b) == ("", "") else f"{name} {_shown(a)} became {_shown(b)}"
        for group in groups
        for name, (a, b) in group.items()
    ]
    return found or [f"the {first.what} differ and nothing that was recorded does"]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    text = str(value)
    return f"{text[:40]}…" if len(text) > 41 else text
