"""Steps and epochs: the worked examples, and brute force over every remainder."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.errors import PlanError
from drumline.plan.steps import Clock, Place, is_due, share

remainders = st.sampled_from(["keep", "drop", "carry"])


def test_the_worked_example() -> None:
    """N = 10,000, B = 32, 5 epochs: 313 an epoch, 1,565 in all, the last of 16; drop gives 312."""
    clock = Clock(10_000, 32, "keep")
    assert (clock.steps_per_epoch, clock.total_for_epochs(5)) == (313, 1565)
    start, stop = clock.slots(313)
    assert stop - start == 16
    assert clock.epoch(363) == 2
    assert clock.slots(363)[0] == 10_000 + 49 * 32  # the 50th step of epoch 2
    assert Clock(10_000, 32, "drop").steps_per_epoch == 312
    carry = Clock(10_000, 32, "carry", limit=50_000)
    assert carry.total_for_epochs(5) == 1563
    assert carry.slots(1563)[1] - carry.slots(1563)[0] == 50_000 - 1562 * 32


@given(st.integers(1, 120), st.integers(1, 150), remainders, st.integers(1, 4))
def test_slots_against_brute_force(n: int, b: int, remainder: str, epochs: int) -> None:
    """Every slot is taken in order, once, and only `drop` leaves any out."""
    if remainder == "drop" and b > n:
        with pytest.raises(PlanError, match="drop leaves no step"):
            Clock(n, b, "drop")
        return
    clock = Clock(n, b, remainder, n * epochs if remainder == "carry" else None)  # type: ignore[arg-type]
    expected = []
    if remainder == "carry":
        expected = [list(range(s, min(s + b, n * epochs))) for s in range(0, n * epochs, b)]
    else:
        for epoch in range(epochs):
            steps = [list(range(s, min(s + b, n))) for s in range(0, n, b)]
            steps = [s for s in steps if remainder == "keep" or len(s) == b]
            expected += [[epoch * n + slot for slot in s] for s in steps]
    total = clock.total_for_epochs(epochs)
    assert [list(range(*clock.slots(t))) for t in range(1, total + 1)] == expected
    consumed = 0
    for step, slots in enumerate(expected, start=1):
        consumed += len(slots)
        assert clock.consumed(step) == consumed
        assert clock.epoch(step) == slots[0] // n + 1
    for epoch in range(1, epochs + 1):
        begins = [t for t in range(1, total + 1) if clock.epoch(t) == epoch]
        if begins:
            assert clock.last_step_of_epoch(epoch) == begins[-1]


@given(st.integers(1, 60), st.integers(1, 70), remainders, st.integers(1, 500))
def test_the_first_step_that_reaches_a_sample_count(
    n: int, b: int, remainder: str, wanted: int
) -> None:
    """Duration in tokens: the step before has consumed fewer, this one enough."""
    if remainder == "drop" and b > n:
        return
    clock = Clock(n, b, remainder)  # type: ignore[arg-type]
    total = clock.total_for_samples(wanted)
    assert clock.consumed(total) >= wanted > clock.consumed(total - 1)


@given(st.integers(1, 100), st.integers(1, 6), st.integers(1, 5))
def test_shares_partition_the_step(count: int, b: int, gpus: int) -> None:
    """All ranks' micro-batches cover each slot once, in the order that the design states."""
    shares = [share(count, b, gpus, rank) for rank in range(gpus)]
    assert len({len(s) for s in shares}) == 1
    for slot in range(count):
        micro_batch, rank = slot // (b * gpus), slot % (b * gpus) // b
        start, stop = shares[rank][micro_batch]
        assert start <= slot < stop
    assert sum(stop - start for s in shares for start, stop in s) == count
    assert all(any(s[m][0] < s[m][1] for s in shares) for m in range(len(shares[0])))


@given(samples=st.integers(1, 400), effective=st.integers(1, 60), remainder=st.sampled_from(["keep", "drop", "carry"]),
       tenths=st.integers(1, 45))  # fmt: skip
def test_a_part_of_an_epoch_ends_with_the_first_step_that_reaches_it(
    samples: int, effective: int, remainder: Any, tenths: int
) -> None:
    """As many steps as that share of an epoch's; whole epochs are as they were."""
    if remainder == "drop" and effective > samples:
        return
    clock = Clock(samples, effective, remainder)
    total = clock.total_for_epochs(tenths / 10)
    done = [clock.epochs_done(step) for step in range(total + 1)]
    assert done[total] >= Fraction(tenths, 10)
    assert total == 0 or done[total - 1] < Fraction(tenths, 10)
    if tenths % 10 == 0:
        assert total == clock.total_for_epochs(tenths // 10)


@given(samples=st.integers(1, 300), effective=st.integers(1, 60), remainder=st.sampled_from(["keep", "carry"]),
       every=st.sampled_from([0.25, 0.3, 0.5, 1, 1.5, 2]))  # fmt: skip
def test_a_cadence_of_epochs_is_met_once_for_each(
    samples: int, effective: int, remainder: Any, every: float
) -> None:
    """The steps that are due are those at which the number of complete multiples grows."""
    clock = Clock(samples, effective, remainder)
    last = clock.total_for_epochs(6)
    due = [step for step in range(1, last + 1) if is_due(step, None, every, clock)]
    reached = {clock.epochs_done(step) // Fraction(str(every)) for step in range(last + 1)} - {0}
    assert len(due) == len(reached)
    if every == 1 and remainder == "keep":
        assert due == [clock.last_step_of_epoch(epoch) for epoch in range(1, 7)]
    assert [step for step in range(1, 21) if is_due(step, 5, None, None)] == [5, 10, 15, 20]


def _walk(clock: Clock, count: int) -> list[tuple[int, int]]:
    """The slots of the next steps, taken one after the other by the rules as they are written."""
    n, slot, found = clock.samples, clock.start.slot, []
    for number in range(count):
        batch = clock.effective_at(clock.first_step + number)
        if clock.remainder == "drop" and n - slot % n < batch:
            slot += n - slot % n
        end = slot + batch
        if clock.remainder != "carry":
            end = min(end, (slot // n + 1) * n)
        found.append((slot, end))
        slot = end
    return found


places = st.builds(
    Place, step=st.integers(0, 50), slot=st.integers(0, 200), consumed=st.integers(0, 300)
)
stages = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), max_size=3)


@given(st.integers(1, 70), st.integers(1, 40), remainders, places, stages)
def test_a_ramp_and_a_start_within_an_epoch_against_a_walk(
    n: int, b: int, remainder: str, start: Place, ramp: list[tuple[int, int]]
) -> None:
    """Steps of stages with their own batch, counted on from another run, follow each other without a gap."""
    steps = sorted({last for last, _ in ramp})
    stages = tuple(zip(steps, (size for _, size in ramp), strict=False))
    if remainder == "drop" and max(b, *(size for _, size in stages), 0) > n:
        return
    clock = Clock(n, b, remainder, None, start, stages)  # type: ignore[arg-type]
    for step in range(clock.first_step, 90):
        inside = [size for last, size in stages if step <= last]
        assert clock.effective_at(step) == (inside[0] if inside else b)
    walked = _walk(clock, 90)
    numbers = range(clock.first_step, clock.first_step + 90)
    assert [clock.slots(step) for step in numbers] == walked
    assert [clock.epoch(step) for step in numbers] == [first // n + 1 for first, _ in walked]
    sums = start.consumed
    for step, (first, end) in zip(numbers, walked, strict=True):
        sums += end - first
        assert clock.consumed(step) == sums
    done = [clock.epochs_done(step) for step in (clock.start.step, *numbers)]
    assert done == sorted(done)
    for epoch in {first // n + 1 for first, _ in walked[:-1]} - {walked[-1][0] // n + 1}:
        begins = [
            step
            for step, (first, _) in zip(numbers, walked, strict=True)
            if first // n + 1 == epoch
        ]
        assert clock.last_step_of_epoch(epoch) == begins[-1]
    total = clock.total_for_epochs(float(done[-1] // 2 + 1))
    assert clock.epochs_done(total) >= done[-1] // 2 + 1
    assert total == clock.start.step or clock.epochs_done(total - 1) < done[-1] // 2 + 1


@given(st.integers(1, 70), st.integers(1, 40), remainders, st.integers(1, 40), st.integers(1, 40))
def test_a_run_that_goes_on_takes_the_samples_of_one_that_never_stopped(
    n: int, b: int, remainder: str, before: int, more: int
) -> None:
    """The steps after another run on the same data are those of one longer run."""
    if remainder == "drop" and b > n:
        return
    whole = Clock(n, b, remainder)  # type: ignore[arg-type]
    goes_on = Clock(n, b, remainder, start=whole.place(before))  # type: ignore[arg-type]
    for step in range(before + 1, before + more + 1):
        assert goes_on.slots(step) == whole.slots(step)
        assert goes_on.consumed(step) == whole.consumed(step)
        assert goes_on.epoch(step) == whole.epoch(step)
    reached = goes_on.consumed(before + more)
    assert goes_on.total_for_samples(reached) == whole.total_for_samples(reached)
    if remainder != "carry" and (before * b) // n < 5:
        assert goes_on.total_for_epochs(20) == whole.total_for_epochs(20)


@given(
    st.integers(1, 70),
    st.integers(1, 40),
    remainders,
    st.integers(1, 60),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9, 1, 1.5, 2.7]),
)
def test_epochs_and_their_parts_are_counted_as_by_one_longer_run(
    n: int, b: int, remainder: str, before: int, part: float
) -> None:
    """Wherever another run has ended, at the end of an epoch too: durations, cadences, samples of these data."""
    if remainder == "drop" and b > n:
        return
    whole = Clock(n, b, remainder)  # type: ignore[arg-type]
    goes_on = Clock(n, b, remainder, start=whole.place(before))  # type: ignore[arg-type]
    for step in range(before, before + 40):
        assert goes_on.epochs_done(step) == whole.epochs_done(step)
    assert goes_on.total_for_epochs(part) == max(before, whole.total_for_epochs(part))
    for step in range(before + 1, before + 40):
        assert is_due(step, None, part, goes_on) == is_due(step, None, part, whole)
    wanted = max(1, round(part * n))
    assert goes_on.total_for_samples(wanted) == max(before, whole.total_for_samples(wanted))
