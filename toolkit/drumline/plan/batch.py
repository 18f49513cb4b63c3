"""The batch equation B = b × G × k: checked, solved, or refused with the nearest legal splits.

b is samples per rank per forward, G data-parallel ranks, k forwards per rank per optimizer step,
B samples per optimizer step. Everything is exact integer arithmetic over divisors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from drumline.errors import PlanError
from drumline.recipe.schema import Batch
from drumline.units import divisors

LARGEST_PER_DEVICE = 1 << 16


@dataclass(frozen=True)
class Split:
    """One split (b, G, k); the product is the effective batch."""

    per_device: int
    gpus: int
    accumulation: int

    @property
    def effective(self) -> int:
        """Samples per optimizer step."""
        return self.per_device * self.gpus * self.accumulation

    def written_into(self, batch: Batch) -> Batch:
        """The recipe's batch section with all four numbers filled in."""
        numbers = {
            "per_device": self.per_device,
            "gpus": self.gpus,
            "accumulation": self.accumulation,
        }
        return batch.model_copy(update={"effective": self.effective, **numbers})

    def __str__(self) -> str:
        return f"{self.per_device} per_device × {self.gpus} gpus × {self.accumulation} accumulation"


Fits = Callable[[Split], bool | None]
"""Whether a split fits in memory; None when that is not known."""


def solve(
    batch: Batch,
    cluster_gpus: int | None,
    fits: Fits,
    allowed: Callable[[int], bool] = lambda gpus: True,
) -> tuple[Split, list[str]]:
    """Solve the recipe's batch section for a split; also returns warnings about what was derived.

    `cluster_gpus` is nodes × gpus_per_node if the recipe states both. With all four numbers given they are
    checked, with three the fourth is computed. With fewer, gpus come from the cluster, then the largest b
    that `fits` and the smallest k are taken. Raises PlanError with the arithmetic and the nearest legal
    splits, whose numbers of GPUs are `allowed` by the cluster.
    """
    b, gpus, k, total = batch.per_device, batch.gpus, batch.accumulation, batch.effective
    if not any((b, gpus, k, total)):
        raise PlanError("batch: nothing is given. Nearest: effective, per_device and gpus")
    if gpus is None and not (total and b and k):
        if cluster_gpus is None:
            raise PlanError(
                "batch: gpus is not given and cluster.nodes × cluster.gpus_per_node is not known. "
                "Nearest: batch.gpus=N"
            )
        gpus = cluster_gpus
    if total is not None:
        return _divide(total, b, gpus, k, fits, allowed), []
    if b is None:
        assert gpus is not None
        b = largest_per_device(None, gpus, k or 1, fits)
        split = Split(b, gpus, k or 1)
        return split, [
            f"batch.effective {split.effective} was derived from what fits in memory: on another "
            f"GPU it would be another training. Write batch.effective={split.effective} to fix it"
        ]
    assert gpus is not None
    return Split(b, gpus, k or 1), []


def _divide(
    total: int,
    b: int | None,
    gpus: int | None,
    k: int | None,
    fits: Fits,
    allowed: Callable[[int], bool],
) -> Split:
    """Solve for a split of a given effective batch; raises PlanError if it does not divide."""
    given = (b or 1) * (gpus or 1) * (k or 1)
    if total % given or (b and gpus and k and given != total):
        raise PlanError(_explain_impossible(total, b, gpus, k, allowed))
    rest = total // given
    if gpus is None:
        assert b and k
        return Split(b, rest, k)
    if b is not None:
        return Split(b, gpus, k or rest)
    if k is not None:
        return Split(rest, gpus, k)
    b = largest_per_device(rest, gpus, None, fits)
    return Split(b, gpus, rest // b)


def largest_per_device(rest: int | None, gpus: int, k: int | None, fits: Fits) -> int:
    """The largest b that fits in memory, or 1 if none fits.

    b is a divisor of `rest` = B / G, or any number if rest is None. Memory grows with b, so bisection is
    exact if every b is legal. Raises PlanError if memory is not known, unless b can only be 1.
    """
    one_fits = fits(Split(1, gpus, k or rest or 1))
    if one_fits is None:
        if rest == 1:
            return 1
        raise PlanError(
            "batch: per_device is not given and the memory of this model is not known, so it "
            "cannot be solved. Nearest: batch.per_device=1"
        )
    if rest is not None:
        legal = [b for b in divisors(rest) if b <= LARGEST_PER_DEVICE]
        sound = [b for b in legal if fits(Split(b, gpus, rest // b))]
        return max(sound, default=1)
    assert k is not None
    low, high = 1, LARGEST_PER_DEVICE
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(Split(middle, gpus, k)) else (low, middle - 1)
    return low


def resplit(split: Split, gpus: int) -> Split:
    """The same effective batch B on another number of GPUs: the largest b' ≤ b that divides B / gpus."""
    total = split.effective
    if total % gpus:
        raise PlanError(_explain_impossible(total, None, gpus, None, lambda gpus: True))
    return _divided(total, gpus, split.per_device)


def _divided(total: int, gpus: int, most: int) -> Split:
    """The split of `total`, a multiple of `gpus`, with the largest per_device up to `most` that divides."""
    rest = total // gpus
    b = max(b for b in divisors(rest) if b <= most)
    return Split(b, gpus, rest // b)


def split_ramp(batch: Batch, split: Split) -> list[tuple[int, Split]]:
    """(last step, split) of each stage of `ramp`, over the GPUs of `split`; else PlanError.

    A stage's per_device is the largest that divides, up to that of `split`.
    """
    found = []
    for number, stage in enumerate(batch.ramp):
        if stage.effective % split.gpus:
            below = stage.effective // split.gpus * split.gpus
            sides = " or ".join(str(size) for size in (below, below + split.gpus) if size)
            common = math.gcd(*(one.effective for one in batch.ramp), split.effective)
            gpus = max(number for number in divisors(common) if number <= split.gpus)
            raise PlanError(
                f"batch.ramp[{number}].effective: {stage.effective} cannot be split over {split.gpus} gpus "
                f"({stage.effective} / {split.gpus} = {stage.effective / split.gpus:.2f}). Nearest: {sides}; "
                f"or gpus {gpus}, which divides all stages"
            )
        found.append((stage.until_step, _divided(stage.effective, split.gpus, split.per_device)))
    return found


def check_ramp(batch: Batch, total: int) -> None:
    """PlanError where a stage ends after the run does, which would never reach `effective`."""
    last = batch.ramp[-1].until_step if batch.ramp else 0
    if last and last >= total:
        shorter = f"until_step {total // 2}" if total > 1 else "no ramp"
        raise PlanError(
            f"batch.ramp: the last stage ends at step {last}, and the run at {total}, so the whole batch is "
            f"never reached. Nearest: {shorter}, or a longer duration"
        )


def nearest_to(wanted: int, legal: list[int]) -> int:
    """The legal number closest to the wanted one; the larger of two equally close ones."""
    return min(legal, key=lambda number: (abs(number - wanted), -number))


def _explain_impossible(
    total: int, b: int | None, gpus: int | None, k: int | None, allowed: Callable[[int], bool]
) -> str:
    """The error text: the failed arithmetic, and all nearest fixes that change a single number."""
    named = (("per_device", b), ("gpus", gpus), ("accumulation", k))
    known = [(name, number) for name, number in named if number]
    product = 1
    for _, number in known:
        product *= number
    equation = " × ".join(f"{number} {name}" for name, number in known)
    unknown = [letter for letter, number in (("b", b), ("G", gpus), ("k", k)) if not number]
    if not unknown:
        head = f"batch: {equation} = {product}, not effective {total}."
        fixes = [f"effective {product}"]
    else:
        quotient = f"{total} / {product} = {total / product:.2f}"
        head = (
            f"batch: {' × '.join([equation, *unknown])} cannot make effective {total} ({quotient})."
        )
        fixes = [_nearest_effective(total, product, unknown)]
    for name, number in known:
        others = product // number
        if total % others == 0:
            rest = total // others
            legal = divisors(rest) if unknown else [rest]
            if name == "gpus":
                legal = [number for number in legal if allowed(number)]
            if not legal:
                continue
            best = nearest_to(number, legal)
            tail = f" ({unknown[0]}={rest // best})" if len(unknown) == 1 else ""
            fixes.append(f"{name} {best}{tail}")
    return f"{head} Nearest: {'; or '.join(fixes)}."


def _nearest_effective(total: int, product: int, unknown: list[str]) -> str:
    """The multiples of `product` just below and just above the given effective batch."""
    below, above = total // product, total // product + 1
    show = f" ({unknown[0]}={{}})" if len(unknown) == 1 else ""
    sides = [f"{product * n}{show.format(n)}" for n in (below, above) if n]
    return f"effective {' or '.join(sides)}"
