"""The gradient noise scale from norms alone: unbiased, with an honest interval, in words."""

import math

import numpy as np
import pytest

from conftest import tiny_recipe
from drumline.errors import PlanError
from drumline.plan.batch import Split
from drumline.plan.noise import (
    FEWEST,
    NoiseScale,
    is_measurable,
    noise_scale,
    noise_words,
    step_pair,
)
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate

SIGNAL, NOISE, SIZE = 3.0, 40.0, 50
"""|G|² and tr Σ of the synthetic problem, in so many dimensions: B_simple = 40/3."""


def draw_pairs(seed: int, steps: int, groups: list[int], shown: int) -> list[tuple[float, float]]:
    """Steps of Σ groups samples of weight 1, of whose groups the first `shown` are measured."""
    source = np.random.default_rng(seed)
    mean = np.full(SIZE, math.sqrt(SIGNAL / SIZE))
    pairs = []
    for _ in range(steps):
        sums = [source.normal(mean, math.sqrt(NOISE / SIZE), (w, SIZE)).sum(axis=0) for w in groups]
        total = sum(groups)
        whole = float(np.square(sum(sums) / total).sum())
        q = sum(
            float(np.square(s).sum()) / w for s, w in zip(sums[:shown], groups[:shown], strict=True)
        )
        pair = step_pair((q, shown, sum(groups[:shown])), whole, total, total)
        assert pair
        pairs.append(pair)
    return pairs


@pytest.mark.parametrize(
    ("groups", "shown"),
    [([4] * 6, 6), ([1, 2, 9, 12], 4), ([6, 18], 1), ([6, 6, 6, 6], 1), ([3, 3, 18], 2)],
)
def test_known_noise_is_found(groups: list[int], shown: int) -> None:
    """Equal and unequal groups, all of them or the first alone: numerator and denominator unbiased."""
    pairs = draw_pairs(1, 4000, groups, shown)
    noise, signal = (np.array(pairs)[:, side] for side in (0, 1))
    for found, true in ((noise, NOISE), (signal, SIGNAL)):
        assert abs(found.mean() - true) < 4 * found.std() / math.sqrt(len(found))
    scale = noise_scale(pairs)
    assert scale
    assert scale.value == pytest.approx(NOISE / SIGNAL, rel=0.15)


def test_the_interval_covers() -> None:
    """Nine of ten 90 % intervals of 128 steps hold the truth (of 200; ± 4 sigma)."""
    true = NOISE / SIGNAL
    held = 0
    for seed in range(200):
        scale = noise_scale(draw_pairs(seed, 128, [4] * 6, 6))
        assert scale
        held += scale.low <= true <= scale.high
    assert 0.9 - 4 * math.sqrt(0.09 / 200) <= held / 200 <= 1.0


def test_nothing_is_said_of_too_little() -> None:
    """Few steps, one group that is the whole step, values that are not finite."""
    assert noise_scale(draw_pairs(1, FEWEST - 1, [4] * 6, 6)) is None
    assert step_pair((5.0, 1, 24), 5.0, 24, 24) is None
    assert step_pair((0.0, 0, 0), 5.0, 24, 24) is None
    assert step_pair((math.inf, 6, 24), 5.0, 24, 24) is None


def test_no_signal_is_no_number() -> None:
    """Where |G|² drowns, the scale is said to be too large, with no upper end."""
    scale = noise_scale([(40.0, -1.0)] * 32)
    assert scale == NoiseScale(math.inf, 0.0, math.inf)
    assert "too large to tell" in noise_words(scale, 24, 1)


def test_units_are_samples() -> None:
    """Tokens as weights, eight a sample: the same scale in samples."""
    by_sample = step_pair((12.0, 4, 24.0), 1.5, 24.0, 24)
    by_token = step_pair((12.0 * 8, 4, 24.0 * 8), 1.5, 24.0 * 8, 24)
    assert by_sample
    assert by_token == pytest.approx(by_sample)


def test_words() -> None:
    """Both excesses with their numbers; accumulation is called useless only where it is."""
    words = noise_words(NoiseScale(100.0, 80.0, 120.0), 400, 4)
    assert "B_simple 100 samples (80 to 120)" in words
    assert "excess data 5.00 ×, excess steps 1.25 ×" in words
    assert "buys nothing" not in words
    assert "accumulation buys nothing here: 250 samples" in noise_words(
        NoiseScale(10.0, 8.0, 12.0), 1000, 4
    )
    assert "buys nothing" not in noise_words(NoiseScale(10.0, 8.0, math.inf), 1000, 4)
    assert "buys nothing" not in noise_words(NoiseScale(10.0, 8.0, 12.0), 1000, 1)
    assert "a larger batch would buy fewer steps" in noise_words(
        NoiseScale(900.0, 800.0, 999.0), 100, 1
    )


@pytest.mark.parametrize(
    ("split", "is_sharded", "found"),
    [
        ((4, 1, 1), False, False),
        ((4, 2, 1), False, True),
        ((4, 2, 1), True, False),
        ((4, 1, 2), True, True),
    ],
)
def test_what_can_be_measured(split: tuple[int, int, int], is_sharded: bool, found: bool) -> None:
    """Two groups in a step; the plan warns where there is one, and refuses HSDP."""
    assert is_measurable(is_sharded, Split(*split)) is found
    b, gpus, k = split
    sections = {
        "batch": {"effective": b * gpus * k, "per_device": b, "gpus": gpus, "accumulation": k},
        "strategy": {"name": "fsdp" if is_sharded else "ddp"},
        "logging": {"noise_scale": True},
    }
    warnings = resolve(validate(tiny_recipe(**sections), "r")).warnings
    assert any("nothing to compare" in warning for warning in warnings) is not found
    node = {"strategy": {"name": "fsdp", "shard": "node"}, "logging": {"noise_scale": True}}
    with pytest.raises(PlanError, match="logging.noise_scale: with strategy.shard node"):
        resolve(validate(tiny_recipe(**node), "r"))
