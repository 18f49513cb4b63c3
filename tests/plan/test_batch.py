"""The batch equation: checked, solved, or refused with the nearest legal splits."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.errors import PlanError
from drumline.plan.batch import Split, nearest_to, resplit, solve
from drumline.recipe.schema import Batch
from drumline.units import divisors

counts = st.integers(1, 200)


def up_to(limit: int):
    """A memory estimate under which micro-batches up to `limit` fit."""
    return lambda split: split.per_device <= limit


@given(counts, counts, counts, st.sampled_from(["effective", "per_device", "gpus", "accumulation"]))
def test_any_three_give_the_fourth(b: int, gpus: int, k: int, missing: str) -> None:
    """Whatever one number is left out, the same split is found."""
    values = {"effective": b * gpus * k, "per_device": b, "gpus": gpus, "accumulation": k}
    values[missing] = None  # type: ignore[assignment]
    split, warnings = solve(Batch(**values), None, up_to(10**9))
    assert split == Split(b, gpus, k)
    assert not warnings


@given(counts, counts, counts, st.integers(1, 10**5))
def test_four_are_checked(b: int, gpus: int, k: int, total: int) -> None:
    """Four numbers are accepted exactly when they multiply."""
    batch = Batch(effective=total, per_device=b, gpus=gpus, accumulation=k)
    if b * gpus * k == total:
        assert solve(batch, None, up_to(1))[0] == Split(b, gpus, k)
    else:
        with pytest.raises(PlanError, match=f"= {b * gpus * k}, not effective {total}"):
            solve(batch, None, up_to(1))


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 64))
def test_two_are_solved_with_the_largest_b_that_fits(total: int, gpus: int, limit: int) -> None:
    """effective and gpus: brute force over all b agrees with the solver."""
    batch = Batch(effective=total, gpus=gpus)
    if total % gpus:
        with pytest.raises(PlanError):
            solve(batch, None, up_to(limit))
        return
    legal = [b for b in range(1, total // gpus + 1) if total // gpus % b == 0 and b <= limit]
    assert solve(batch, None, up_to(limit))[0] == Split(
        max(legal), gpus, total // gpus // max(legal)
    )


def test_one_is_solved_from_the_cluster() -> None:
    """Only effective given: gpus are the cluster's, or are asked for."""
    assert solve(Batch(effective=64), 8, up_to(4))[0] == Split(4, 8, 2)
    with pytest.raises(PlanError, match=r"gpus is not given.*Nearest: batch.gpus=N"):
        solve(Batch(effective=64), None, up_to(4))
    with pytest.raises(PlanError, match="nothing is given"):
        solve(Batch(), 8, up_to(4))


def test_without_effective_it_is_derived_and_said() -> None:
    """per_device and gpus give effective with k = 1; a b taken from memory is warned about."""
    assert solve(Batch(per_device=4, gpus=5), None, up_to(9))[0] == Split(4, 5, 1)
    split, warnings = solve(Batch(gpus=3, accumulation=2), None, up_to(7))
    assert split == Split(7, 3, 2)
    assert "Write batch.effective=42" in warnings[0]


def test_unknown_memory_asks_for_per_device() -> None:
    """What cannot be solved is asked for, never guessed."""
    with pytest.raises(PlanError, match="Nearest: batch.per_device=1"):
        solve(Batch(effective=64, gpus=4), None, lambda split: None)


def test_the_message_of_the_design() -> None:
    """Path, values, arithmetic and every nearest fix, word for word."""
    with pytest.raises(PlanError) as caught:
        solve(Batch(effective=128, per_device=4, gpus=6), None, up_to(8))
    assert str(caught.value) == (
        "batch: 4 per_device × 6 gpus × k cannot make effective 128 (128 / 24 = 5.33). "
        "Nearest: effective 120 (k=5) or 144 (k=6); or gpus 8 (k=4)."
    )


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_every_suggested_fix_is_legal_and_nearest(total: int, b: int, gpus: int) -> None:
    """Each fix in the message works, and no nearer one exists (brute force)."""
    try:
        solve(Batch(effective=total, per_device=b, gpus=gpus), None, up_to(8))
        return
    except PlanError as error:
        message = str(error)
    for value in re.findall(r"(\d+) \(k=", message.split("effective", 2)[2].split("; or")[0]):
        assert int(value) % (b * gpus) == 0
        assert abs(int(value) - total) < b * gpus
    for name, other, number in (("gpus", b, gpus), ("per_device", gpus, b)):
        found = re.search(rf"or {name} (\d+) \(k=(\d+)\)", message)
        legal = [n for n in range(1, total + 1) if total % (other * n) == 0]
        assert bool(found) == bool(legal)
        if found:
            suggested, k = int(found[1]), int(found[2])
            assert suggested * other * k == total
            assert abs(suggested - number) == min(abs(n - number) for n in legal)


@given(counts, counts, counts, st.integers(1, 64))
def test_resplit_keeps_the_effective_batch(b: int, gpus: int, k: int, wanted: int) -> None:
    """Another GPU count keeps B and never raises per_device; or it is refused."""
    before = Split(b, gpus, k)
    if before.effective % wanted:
        with pytest.raises(PlanError, match=f"{wanted} gpus"):
            resplit(before, wanted)
        return
    after = resplit(before, wanted)
    assert (after.effective, after.gpus) == (before.effective, wanted)
    assert after.per_device <= b
    if before.effective % (wanted * b) == 0:
        assert after.per_device == b


def test_doubling_the_gpus_halves_accumulation() -> None:
    """Doubling the GPUs halves accumulation and keeps the effective batch."""
    assert resplit(Split(8, 4, 4), 8) == Split(8, 8, 2)
    assert resplit(Split(8, 4, 1), 8) == Split(4, 8, 1)


def test_helpers() -> None:
    """Divisors are complete; of two as near, the larger is chosen."""
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert nearest_to(6, [1, 2, 4, 8, 16]) == 8
