"""How many samples of an epoch each source of a mixture gives. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

from drumline.errors import PlanError
from drumline.plan.model import SourceFacts
from drumline.recipe.data_section import Data


def source_facts(data: Data, rows: Mapping[str, int] | None, samples: int) -> list[SourceFacts]:
    """The sources of a mixture with their shares of an epoch of so many samples; none of other data.

    `rows`: of each source's prepared training rows by its label, None where they are not prepared.
    """
    if data.mixture is None:
        return []
    found = shares([own.weight for own in data.mixture], samples)
    labels = list(data.sources())
    for label, share, own in zip(labels, found, data.mixture, strict=True):
        if not share:
            raise PlanError(
                f"data.mixture: {label}: weight {own.weight:g} is less than one of {samples:,} samples of an "
                "epoch. Nearest: a larger weight, or data.samples, those of an epoch"
            )
    return [
        SourceFacts(label, rows[label] if rows else None, share)
        for label, share in zip(labels, found, strict=True)
    ]


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """`samples` divided by these weights, in whole numbers, by the largest remainders; earlier ones first."""
    exact = [Fraction(str(weight)) for weight in weights]
    wanted = [weight * samples / sum(exact) for weight in exact]
    found = [int(share) for share in wanted]
    left = samples - sum(found)
    by_remainder = sorted(range(len(found)), key=lambda n: (found[n] - wanted[n], n))
    for number in by_remainder[:left]:
        found[number] += 1
    return found


def mixed_fingerprint(rows: str, parts: Sequence[int]) -> str:
    """The fingerprint of a mixture: of its sources' rows, and how many of each an epoch has."""
    return f"mixture:{hashlib.sha256(f'{rows}/{list(parts)}'.encode()).hexdigest()}"


def mixed_lengths(lengths: Sequence[Sequence[int]], parts: Sequence[int]) -> list[int]:
    """Lengths at 0 %, 1 %, … 100 % of the rows of a mixture, from those of its sources and their shares."""
    pairs = sorted(
        (length, Fraction(part, len(own)))
        for own, part in zip(lengths, parts, strict=True)
        for length in own
    )
    total, reached, found = sum(share for _, share in pairs), Fraction(0), [pairs[0][0]]
    for length, share in pairs:
        reached += share
        while len(found) <= 100 and reached * 100 >= total * len(found):
            found.append(length)
    return found
