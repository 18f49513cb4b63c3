"""Mixtures: exact shares of every epoch, an order that needs no history, and what a plan says of it."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.plan import order
from drumline.plan.mixture import mixed_lengths, shares
from drumline.plan.model import Plan, read_plan
from drumline.plan.resolve import resolve
from drumline.plan.world import World
from drumline.recipe.load import merge, validate
from drumline.session.show import plan_table
from plan.test_advice_followed import BASE

TWO = [{"weight": 0.7, "source": "files", "path": "/code.jsonl"},
       {"weight": 0.3, "source": "files", "path": "/chat.jsonl", "label": "talk"}]  # fmt: skip


def plan_of(mixture: Any = TWO, world: World | None = None, **sections: Any) -> Plan:
    data = {"source": "mixture", "path": None, "mixture": mixture, "samples": None}
    recipe = validate(merge(BASE, merge({"data": data}, sections)), "r")
    return resolve(
        recipe,
        world or World(samples=1000, mixture={"code": 900, "talk": 100}, fingerprint="sha256:a"),
    )


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), st.integers(1, 5000))
def test_shares_are_exact(weights: list[float], samples: int) -> None:
    """They make up the epoch, and none is a whole sample off its weight."""
    found = shares(weights, samples)
    assert sum(found) == samples
    exact = [weight / sum(weights) * samples for weight in weights]
    assert all(abs(share - wanted) < 1 + 1e-6 for share, wanted in zip(found, exact, strict=True))


def test_shares_of_the_worked_examples() -> None:
    """Weights as they are written: tenths are tenths; ties go to the earlier source."""
    assert shares([0.7, 0.2, 0.1], 1000) == [700, 200, 100]
    assert shares([1.0, 1.0], 7) == [4, 3]
    assert shares([3.0, 1.0], 100) == [75, 25]


sources = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=2, max_size=4)


@given(sources, st.integers(0, 2**40), st.integers(1, 4))
def test_every_epoch_has_its_shares_and_rows_are_seen_evenly(
    mixture: list[tuple[int, int]], seed: int, epochs: int
) -> None:
    """Counted over all slots: each source's share in each epoch, and no row once more than once more."""
    n = sum(share for _, share in mixture)
    offsets = np.cumsum([0, *(rows for rows, _ in mixture)])
    found = order.slot_indices(seed, n, 0, epochs * n, mixture)
    for epoch in range(epochs):
        owners = np.searchsorted(offsets, found[epoch * n : (epoch + 1) * n], side="right") - 1
        assert Counter(owners.tolist()) == {s: share for s, (_, share) in enumerate(mixture)}
    times = Counter(found.tolist())
    for source, (rows, share) in enumerate(mixture):
        seen = [times[row] for row in range(offsets[source], offsets[source] + rows)]
        assert sum(seen) == epochs * share
        assert max(seen) - min(seen) <= 1


@given(sources, st.integers(0, 99), st.integers(0, 500), st.integers(0, 60))
def test_any_slots_are_found_without_those_before(
    mixture: list[tuple[int, int]], seed: int, first: int, count: int
) -> None:
    """A resume and every split see the same rows."""
    n = sum(share for _, share in mixture)
    whole = order.slot_indices(seed, n, 0, first + count, mixture)
    assert (
        order.slot_indices(seed, n, first, first + count, mixture).tolist()
        == whole[first:].tolist()
    )


def test_a_plan_says_the_shares_and_how_often_rows_are_seen() -> None:
    """By default an epoch has as many samples as there are rows; `samples` makes it longer or shorter."""
    plan = plan_of(duration={"steps": None, "epochs": 2})
    assert [(own.label, own.rows, own.share) for own in plan.data.mixture] == [
        ("code", 900, 700),
        ("talk", 100, 300),
    ]
    assert (
        "talk: 300 samples an epoch (30.00%) of 100 rows; a row is seen 6 times in this run"
        in plan_table(plan)
    )
    assert plan.steps.samples == 1000
    longer = plan_of(data={"samples": 5000})
    assert [own.share for own in longer.data.mixture] == [3500, 1500]
    assert longer.steps.samples == 5000
    unknown = plan_of(data={"samples": 5000}, world=World())
    assert [(own.rows, own.share) for own in unknown.data.mixture] == [(None, 3500), (None, 1500)]
    assert read_plan(plan.to_json()) == plan


def test_another_share_is_another_training_on_other_data() -> None:
    """So a run that goes on with other weights begins the order anew, though no row has changed."""
    other = [{**TWO[0], "weight": 0.6}, {**TWO[1], "weight": 0.4}]
    plans = [
        plan_of(),
        plan_of(other),
        plan_of([{**TWO[0], "weight": 7.0}, {**TWO[1], "weight": 3.0}]),
    ]
    prints = [plan.data.fingerprint for plan in plans]
    assert prints[0] == prints[2] != prints[1]
    assert len({plan.training_sha256 for plan in plans}) == 3
    assert plans[0].data.fingerprint != "sha256:a"


def test_sources_are_named_by_their_files() -> None:
    """Stems in small letters, numbered where they are the same; a label of one's own instead."""
    named = validate(merge(BASE, {"data": {"source": "mixture", "path": None, "mixture": [
        {"weight": 1.0, "source": "files", "path": ["/a/My Web.jsonl.gz", "/b"]},
        {"weight": 1.0, "source": "files", "path": "/c/my web.txt"},
        {"weight": 1.0, "source": "hub", "name": "org/Set_1"},
        {"weight": 1.0, "source": "factory", "factory": "rows:make"},
        {"weight": 1.0, "source": "files", "path": "/d/*.jsonl"}]}}), "r").data.sources()  # fmt: skip
    stated = validate(merge(BASE, {"data": {"source": "mixture", "path": None, "mixture": [
        {"weight": 1.0, "source": "files", "path": "/a.jsonl"},
        {"weight": 1.0, "source": "files", "path": "/b.jsonl", "label": "a"}]}}), "r").data.sources()  # fmt: skip
    assert {label: own.path for label, own in stated.items()} == {
        "a-2": "/a.jsonl",
        "a": "/b.jsonl",
    }
    assert list(named) == ["my-web", "my-web-2", "org-set_1", "rows-make", "d"]


@pytest.mark.parametrize("parts", [[1, 1], [3, 1], [1, 99]])
def test_lengths_of_a_mixture_are_those_of_its_samples(parts: list[int]) -> None:
    """Against the quantiles of a sample that is drawn in these shares."""
    lengths = [list(range(10, 111)), list(range(200, 301))]
    found = mixed_lengths(lengths, parts)
    drawn = sorted(value for own, part in zip(lengths, parts, strict=True) for value in own * part)
    wanted = np.quantile(drawn, np.linspace(0, 1, 101))
    assert len(found) == 101
    assert np.abs(np.array(found) - wanted).max() <= 100 / min(parts) if min(parts) > 1 else True
    assert (found[0], found[-1]) == (10, 300)
    below = sum(value <= 110 for value in found) / 101
    assert abs(below - parts[0] / sum(parts)) < 0.02
