"""The verdict on two runs: each planted change is found at its step, and named."""

import copy
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.compare.comparison import compare, step_indices
from drumline.compare.logged import Logged
from drumline.recipe.load import validate

WEIGHTS = {"step": 9, "sha256": "s", "elements": 4, "norm": 1.0, "sketch": [1.0] * 64}


def logged() -> Logged:
    """Nine steps of a run, with everything that a record holds."""
    record = {
        "recipe": validate(tiny_recipe(), "r").model_dump(by_alias=True),
        "data": {"fingerprint": "f", "tokenizer": "t", "samples": 8000},
        "model": {"fingerprint": "m"},
        "code": {
            "commit": "c" * 40,
            "diff": "",
            "untracked": {},
            "factories": {"example_models.py": "d" * 64},
        },
        "drumline_sha256": "e" * 64,
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "hardware": {"cpu": "one", "platform": "Linux", "gpus": []},
        "attempts": [],
        "weights": WEIGHTS,
    }
    steps = [
        {
            "step": n,
            "digest": f"d{n}",
            "lr": 0.1 / n,
            "loss": 2.0 / n,
            "grad_norm": 1.0 * n,
            "weight": 12.0,
            "skipped": False,
        }
        for n in range(1, 10)
    ]
    return Logged("a", record, steps)


def altered(change: Any) -> Logged:
    other = copy.deepcopy(logged())
    change(other)
    return other


def set_step(step: int, **values: Any) -> Any:
    return lambda run: run.steps[step - 1].update(values)


def test_the_same_is_identical() -> None:
    """Bit for bit, the weights' digest too."""
    found = compare(logged(), logged())
    assert found.verdict == "identical"
    assert found.words == "identical: 9 steps and the final weights, bit for bit"


def test_rounding_is_equal() -> None:
    """A loss in its seventh digit, weights a little apart."""

    def change(run: Logged) -> None:
        run.steps[3]["loss"] *= 1 + 2e-6
        run.record["weights"] = {**WEIGHTS, "sha256": "t", "sketch": [1.0 + 1e-8] * 64}

    found = compare(logged(), altered(change))
    assert found.verdict == "equal"
    assert found.loss_error == pytest.approx(1e-6)
    assert found.weights_error == pytest.approx(8e-8)
    assert "equal within 1e-05: 9 steps and the final weights" in found.words
    assert compare(logged(), altered(change), tolerance=1e-7).verdict == "diverged"


@pytest.mark.parametrize(
    ("change", "step", "what", "named"),
    [
        (set_step(4, digest="x"), 4, "samples", "nothing that was recorded"),
        (set_step(4, lr=0.026), 4, "learning rate", "nothing that was recorded"),
        (set_step(4, weight=11.0), 4, "weight", "nothing that was recorded"),
        (set_step(4, skipped=True), 4, "skipped", "nothing that was recorded"),
        (set_step(4, loss=None), 4, "loss", "nothing that was recorded"),
        (set_step(9, loss=9.9), 9, "loss", "nothing that was recorded"),
        (
            lambda r: r.record.update(weights={**WEIGHTS, "sha256": "t", "sketch": [1.1] * 64}),
            9,
            "final weights",
            "",
        ),
    ],
)
def test_the_first_difference_is_found(change: Any, step: int, what: str, named: str) -> None:
    """At its step, in what it is, and without a made-up cause."""
    found = compare(logged(), altered(change))
    assert found.verdict == "diverged"
    assert found.first
    assert (found.first.step, found.first.what) == (step, what)
    assert named in found.words


@pytest.mark.parametrize(
    ("cause", "effect", "words"),
    [
        (lambda r: r.recipe.update(seed=6), {"digest": "x"}, "seed 5 became 6"),
        (lambda r: r.recipe["optimizer"].update(lr=0.5), {"lr": 0.5}, "optimizer.lr 0.001 became 0.5"),
        (lambda r: r.record["data"].update(fingerprint="g"), {"loss": 9.0}, "data f became g"),
        (lambda r: r.record["versions"].update(torch="2.12.0"), {"loss": 9.0}, "version of torch 2.13.0 became 2.12.0"),
        (lambda r: r.record["code"]["factories"].update({"example_models.py": "0" * 64}), {"loss": 9.0},
         "file example_models.py dddddddddddd became 000000000000"),
        (lambda r: r.record["code"].update(diff="diff --git a/m.py b/m.py\n+x\n"), {"loss": 9.0}, "diff of m.py absent became"),
        (lambda r: r.record.update(drumline_sha256="0" * 64), {"loss": 9.0}, "drumline's source eeee"),
        (lambda r: r.record["hardware"].update(gpus=[{"name": "H100", "driver": "5"}]), {"loss": 9.0}, "H100 (driver 5)"),
    ],
)  # fmt: skip
def test_a_planted_cause_is_named(cause: Any, effect: dict[str, Any], words: str) -> None:
    """Whatever can have caused the first difference, and nothing that cannot."""

    def change(run: Logged) -> None:
        cause(run)
        for line in run.steps[2:]:
            line.update(effect)

    found = compare(logged(), altered(change))
    assert found.words.startswith("diverged at step 3 because ")
    assert words in found.words


def test_a_rate_is_not_blamed_on_the_machine() -> None:
    """Another version of torch does not change a learning rate."""

    def change(run: Logged) -> None:
        run.record["versions"]["torch"] = "2.12.0"
        run.steps[0]["lr"] = 0.2

    assert "torch" not in compare(logged(), altered(change)).words


def test_a_step_told_by_one_alone_does_not_count() -> None:
    """Steps in common are compared; none in common is no agreement."""
    short = altered(
        lambda run: (run.steps.__delitem__(slice(0, 9)), run.record.update(weights=None))
    )
    assert compare(logged(), short).verdict == "diverged"


def test_indices_are_those_that_trained() -> None:
    """The listed samples are the ones whose digest stands in the metrics."""
    from drumline.plan import order

    indices = step_indices(logged(), 3)
    assert indices == order.indices(5, 8000, 1, 24, 36).tolist()
