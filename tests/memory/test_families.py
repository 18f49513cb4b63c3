"""Every family: the closed form says what the trace says, and both give the same verdict."""

import statistics

import pytest

from memory.family_grid import cells
from memory.plans import SMALL


@pytest.mark.parametrize("architecture", SMALL)
def test_the_closed_form_is_the_trace(architecture: str) -> None:
    """Three combinations of shape, precision and strategy: median ≤ 1 %, none above 4 %; the verdicts agree.

    On a card with 7 % less than the step allocates both say that it does not fit; on one with half as much
    again, that it does. `benchmarks/families.py` does all 27.
    """
    errors = []
    for cell in cells(architecture, is_all=False):
        errors.append(abs(cell.error))
        assert cell.verdicts(0.93) == ("does_not_fit", "does_not_fit"), cell.sections
        closed_form, trace = cell.verdicts(1.5)
        assert closed_form == trace, cell.sections
        assert closed_form in ("fits", "tight"), cell.sections
    assert statistics.median(errors) <= 0.01
    assert max(errors) <= 0.04
