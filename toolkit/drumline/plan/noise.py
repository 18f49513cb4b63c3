"""The gradient noise scale, to judge a larger batch (McCandlish et al. 2018, arXiv:1812.06162). Pure.

The mean gradient m of a group of samples with weight w has E|m|² = |G|² + S/w, where G is the true gradient
and S the trace of the gradient noise's covariance at unit weight. From n disjoint groups of total weight w
with Q = Σ w_j |m_j|², and the whole step's gradient of weight W with squared norm F:

    S = (Q/w − F) / (n/w − 1/W),   |G|² = F − S/W,   B_simple = S / |G|²

The estimates of S and |G|² are unbiased, but their ratio is not; so each is averaged over steps before
dividing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drumline.plan.batch import Split

WINDOW = 256
"""Number of last steps that are averaged."""
FEWEST = 16
"""Fewest steps for an estimate."""
_BLOCKS = 16
_SIGMAS = 1.645
"""Half-width of a 90 % interval of the normal distribution, in standard deviations."""
_LITTLE = 1.1
"""Up to 10 % more steps count as hardly more, if each step needs k times less data."""

Pair = tuple[float, float]
"""(S, |G|²) of a step, S in samples × squared gradient."""


@dataclass(frozen=True)
class NoiseScale:
    """B_simple in samples, with its 90 % interval; infinite if |G|² is not distinguishable from zero."""

    value: float
    low: float
    high: float


def step_pair(groups: Sequence[float], whole: float, weight: float, samples: int) -> Pair | None:
    """(S, |G|²) of one step, or None if S cannot be estimated: a single group, or values not finite.

    `groups`: Q, n and w; `whole`: F; `weight`: W; `samples`: number of samples in the step.
    """
    q, n, w = groups
    if n < 1 or w <= 0 or not all(map(math.isfinite, (q, whole))):
        return None
    apart = n / w - 1 / weight
    if apart * weight < 1e-6:
        return None
    noise = (q / w - whole) / apart
    return noise * samples / weight, whole - noise / weight


def noise_scale(pairs: list[Pair]) -> NoiseScale | None:
    """The ratio of the averages, with a jackknife interval over blocks of consecutive steps."""
    if len(pairs) < FEWEST:
        return None
    noise, signal = (math.fsum(pair[side] for pair in pairs) for side in (0, 1))
    if signal <= 0:
        return NoiseScale(math.inf, 0.0, math.inf)
    value = max(0.0, noise / signal)
    size = -(-len(pairs) // _BLOCKS)
    left_out = []
    for start in range(0, len(pairs), size):
        block = pairs[start : start + size]
        rest = signal - math.fsum(pair[1] for pair in block)
        if rest <= 0:
            return NoiseScale(value, 0.0, math.inf)
        left_out.append((noise - math.fsum(pair[0] for pair in block)) / rest)
    count, mean = len(left_out), math.fsum(left_out) / len(left_out)
    spread = math.sqrt((count - 1) / count * math.fsum((one - mean) ** 2 for one in left_out))
    return NoiseScale(value, max(0.0, value - _SIGMAS * spread), value + _SIGMAS * spread)


def logged_noise(line: dict[str, Any]) -> NoiseScale | None:
    """Read the noise scale from a line of metrics.jsonl (null: infinite); None if it has none."""
    if "noise_scale" not in line:
        return None
    names = ("noise_scale", "noise_scale_low", "noise_scale_high")
    return NoiseScale(*(math.inf if line.get(name) is None else line[name] for name in names))


def noise_words(found: NoiseScale, effective: int, accumulation: int) -> str:
    """A sentence or two on what the noise scale means for this effective batch B.

    Relative to their minimum, the data needed grow by 1 + B/B_simple and the steps by 1 + B_simple/B.
    """
    if not math.isfinite(found.value):
        return "noise scale: too large to tell; a larger batch would still buy fewer steps"
    between = f"{found.low:,.0f} to {found.high:,.0f}"
    data, steps = (
        _excess(effective, found.value),
        _excess(found.value, effective),
    )
    words = (
        f"noise scale B_simple {found.value:,.0f} samples ({between}); at effective {effective:,}: "
        f"excess data {data:.2f} ×, excess steps {steps:.2f} ×"
    )
    alone = effective // accumulation
    is_told = accumulation > 1 and math.isfinite(found.high)
    if is_told and _excess(found.high, alone) <= _LITTLE * _excess(found.high, effective):
        words += (
            f"; accumulation buys nothing here: {alone:,} samples a step need hardly more steps"
        )
    elif found.low > effective:
        words += "; a larger batch would buy fewer steps for little more data"
    return words


def _excess(a: float, b: float) -> float:
    return 1 + a / b if b else math.inf


def is_measurable(is_sharded: bool, split: Split) -> bool:
    """Whether a step has at least two groups: a group is one micro-batch of one rank.

    Under FSDP2 it is one micro-batch of all ranks, as gradients are seen only after the reduce-scatter.
    """
    return split.accumulation > 1 or (split.gpus > 1 and not is_sharded)
