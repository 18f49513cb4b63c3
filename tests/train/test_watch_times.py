"""Seconds by phase, as each step's line has them: all of the time is counted, once."""

import time
from collections.abc import Iterator

import pytest

from drumline.phases import Phase
from drumline.train.watch import Watch


def test_every_second_of_a_step_is_in_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is moved by hand; what comes before the first step is not among them."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    def steps() -> Iterator[int]:
        for number in (1, 2):
            after(0.5)
            yield number

    watch, lines = Watch(), []
    watch.enter(Phase.BUILDING)
    after(100)
    for number in watch.reading(steps()):
        watch.begin(number)
        for _ in range(2):
            after(0.25)
            watch.enter(Phase.FORWARD)
            after(1)
            watch.enter(Phase.BACKWARD)
            after(2)
        watch.enter(Phase.REDUCING)
        after(3)
        watch.enter(Phase.UPDATING)
        after(4)
        lines.append(watch.spent())
        after(8)
        watch.enter(Phase.SAVING)
        after(16)
    forward = 2 * (0.25 + 1) - 0.25
    first = {
        "time/data": 0.5,
        "time/forward": forward,
        "time/backward": 4.25,
        "time/reduce": 3,
        "time/optimizer": 4,
    }
    assert lines[0] == first
    assert lines[1] == {**first, "time/optimizer": 8 + 4, "time/save": 16}
    assert watch.spent() == {"time/optimizer": 8, "time/save": 16}
    assert watch.spent() == {}
