"""The verdicts on jobs whose outcome is known: `benchmarks/fits.py`, whose table stands in docs/memory.md."""

import sys

import pytest

from conftest import ROOT
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate

sys.path.insert(0, str(ROOT / "benchmarks"))
from fits import Job, jobs


def verdict_of(job: Job) -> str:
    return resolve(validate(job.recipe, job.words)).memory.verdict


@pytest.mark.parametrize(
    ("group", "ran"), [("fms", True), ("llm-foundry", True), ("fms, smaller card", False)]
)
def test_known_outcomes(group: str, ran: bool) -> None:
    """Of what ran at most a tenth is refused; nothing that cannot run is let through, not even as tight."""
    found = {job.words: verdict_of(job) for job in jobs() if job.group == group}
    assert len(found) >= 28
    wrong = [words for words, verdict in found.items() if (verdict != "does_not_fit") != ran]
    assert len(wrong) <= (len(found) // 10 if ran else 0), wrong
