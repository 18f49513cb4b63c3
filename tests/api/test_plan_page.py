"""`drumline plan --html` and what a notebook shows, in a real Chromium: light, dark, and on a phone."""

from pathlib import Path
from typing import Any

import pytest

import drumline
from advice import command
from browser import PHONE, chromium, contrasts, watched, width_of_content

pytestmark = [pytest.mark.xdist_group("browser")]
__all__ = ["chromium"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plan with everything, one that does not fit, and one whose memory is unknown."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("plan", "llama-8b-8xh100", "--html").code == 0
        assert (
            command(
                "plan", "llama-1b-8xh100", "batch.per_device=32", "batch.accumulation=2", "--html"
            ).code
            == 3
        )
        assert command("plan", "worked-example", "--html").code == 0
    return [
        folder / f"{name}-plan.html"
        for name in ("llama-8b-8xh100", "llama-1b-8xh100", "worked-example")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read(
    chromium: Any, pages: list[Path], scheme: str, size: dict[str, Any]
) -> None:
    """Nothing on the console, no request, no sideways scrolling of the page, enough contrast."""
    for file in pages:
        page, said = watched(chromium, file, color_scheme=scheme, **size)
        assert said == []
        assert width_of_content(page) <= page.viewport_size["width"]
        found = contrasts(page, "p, dt, dd, td, th, small, li, .bar-row span")
        assert len(found) > 5
        assert min(found) >= 4.5
        page.close()


def test_what_it_shows_is_the_plan(chromium: Any, pages: list[Path]) -> None:
    """The equation, each bar's share of the device, and the recipe's own place in the heat map."""
    page, _ = watched(chromium, pages[0])
    plan = drumline.plan("llama-8b-8xh100")
    numbers = [int(text.replace(",", "")) for text in page.locator(".equation b").all_inner_texts()]
    b = plan.batch
    assert numbers == [b.effective, b.per_device, b.gpus, b.accumulation]
    bars = {row.locator("span").first.inner_text(): row for row in page.locator(".bar-row").all()}
    assert plan.memory.capacity
    for phase, size in plan.memory.phases.items():
        shown = bars[str(phase)].evaluate(
            "row => row.querySelector('i').offsetWidth / row.querySelector('.bar').offsetWidth"
        )
        assert shown == pytest.approx(size / plan.memory.capacity, abs=0.01)
    assert page.locator("td.now").count() == 1
    page.close()
    page, _ = watched(chromium, pages[1])
    assert "does not fit" in page.locator("p.does_not_fit").inner_text()
    page.close()
