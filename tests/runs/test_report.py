"""The report in a real headless Chromium: silent, exact, readable on a phone, usable by keyboard."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logged_runs import make_run, step_line, write_lines

from browser import chromium, watched
from drumline.compare.report import MOST_POINTS, thinned, write_report
from drumline.compare.sources import read_folder
from drumline.runs.folder import RunFolder

pytestmark = [pytest.mark.xdist_group("browser")]
__all__ = ["chromium"]

GB = 10**9


def attempt(number: int, started: str, ended: str, outcome: str, **facts: Any) -> dict[str, Any]:
    split = {"per_device": 3, "gpus": 2, "accumulation": 2}
    return {"number": number, "cause": "start", "split": split, "started": f"2026-01-01T00:{started}+00:00",
            "ended": f"2026-01-01T00:{ended}+00:00", "outcome": outcome, **facts}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """A run that failed once and was split otherwise, with a hostile name; and a plain one."""
    base = tmp_path_factory.mktemp("runs")
    start = 1767225600.0  # 2026-01-01
    lines: list[dict[str, Any]] = [step_line(n) for n in range(1, 61)]
    lines[30]["loss"] = lines[30]["grad_norm"] = None
    lines += [{"step": 30, "eval/loss": 0.31}, {"step": 60, "eval/loss": 0.11},
              {"step": 30, "checkpoint/saved": start + 60}, {"step": 60, "checkpoint/saved": start + 290}]  # fmt: skip
    first = make_run(base / "<img src=x onerror=alert(1)> 'a", lines)
    memory = {"measured": {"allocated": 30 * GB, "reserved": 33 * GB, "device": 35 * GB}}
    first.note(
        attempts=[
            attempt(0, "00:00", "02:00", "failed", message="rank 1 ended without a word", step=31),
            attempt(1, "02:05", "05:00", "finished", step=60, from_step=30, memory=memory,
                    split={"per_device": 1, "gpus": 4, "accumulation": 3}),
        ],
        outcome="finished",
        plan={**first.read_record()["plan"], "memory": {
            **first.read_record()["plan"]["memory"], "method": "closed-form", "peak_phase": "backward",
            "parts": {"parameters": 16 * GB, "activations": 14 * GB}, "capacity": 80 * GB,
            **{name: {"low": 28 * GB, "expected": 30 * GB, "high": high * GB}
               for name, high in (("allocated", 32), ("reserved", 36), ("device", 40))}}},
    )  # fmt: skip
    second = make_run(base / "plain", [step_line(n, loss=2.0 + 1.0 / n) for n in range(1, 41)])
    return [first, second]


def open_page(
    chromium: Any, folder: Path, runs: list[RunFolder], **kind: Any
) -> tuple[Any, list[str]]:
    """The report of these runs in a window, and what its console said."""
    file = folder / "report.html"
    file.write_text(write_report([read_folder(run) for run in runs]))
    return watched(chromium, file, **kind)


def drawn(page: Any, curve: str) -> dict[str, list[list[float]]]:
    """Step and value of every vertex that is drawn, read back from the path through the axes."""
    svg = page.locator(f"figure[data-curve={curve}] svg")
    axes = {name: float(value) for name, value in svg.evaluate("svg => ({...svg.dataset})").items()}
    found = {}
    for path in svg.locator("path.curve").all():
        points = re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get_attribute("d"))
        found[path.get_attribute("data-name")] = [
            [axes["x0"] + (float(x) - axes["left"]) / (axes["right"] - axes["left"]) * (axes["x1"] - axes["x0"]),
             axes["y0"] + (axes["bottom"] - float(y)) / (axes["bottom"] - axes["top"]) * (axes["y1"] - axes["y0"])]
            for x, y in points
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("curve", ["loss", "lr", "grad_norm", "tokens_per_s"])
def test_the_curves_are_the_metrics(
    chromium: Any, runs: list[RunFolder], tmp_path: Path, curve: str
) -> None:
    """Every vertex on the screen is a line of metrics.jsonl, to a hundredth of a pixel; none is missing."""
    page, said = open_page(chromium, tmp_path, runs)
    assert said == []
    found = drawn(page, curve)
    for run in runs:
        lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        want = [
            [line["step"], line[curve]]
            for line in lines
            if "lr" in line and line[curve] is not None
        ]
        vertices = found.pop(run.path.name)
        assert len(vertices) == len(want)
        high = max(value for _, value in want)
        for (step, value), (x, y) in zip(want, vertices, strict=True):
            assert x == pytest.approx(step, abs=0.05)
            assert y == pytest.approx(value, abs=0.0002 * high + 1e-9)
    left = {name: [round(step) for step, _ in points] for name, points in found.items()}
    assert left == ({f"{runs[0].path.name} validation": [30, 60]} if curve == "loss" else {})
    page.close()


def test_keys_move_along_a_curve_and_tell_its_values(
    chromium: Any, runs: list[RunFolder], tmp_path: Path
) -> None:
    """Home, End, arrows and pages on a focused chart; each value as it was measured."""
    page, _ = open_page(chromium, tmp_path, [runs[1]])
    figure = page.locator("figure[data-curve=loss]")
    figure.focus()
    for key, step in (
        ("End", 40),
        ("ArrowLeft", 39),
        ("PageUp", 35),
        ("Home", 1),
        ("ArrowLeft", 1),
        ("ArrowRight", 2),
    ):
        page.keyboard.press(key)
        shown = figure.locator(".readout").inner_text()
        assert shown.startswith(f"step {step}: ")
        assert float(shown.split(": ")[1]) == pytest.approx(2.0 + 1.0 / step, rel=1e-5)
    page.close()


def test_tab_reaches_everything(chromium: Any, runs: list[RunFolder], tmp_path: Path) -> None:
    """Check boxes, charts, details and commands, in the order of the page."""
    page, _ = open_page(chromium, tmp_path, runs)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName"))
    assert reached[:10] == ["INPUT"] * 3 + ["FIGURE"] * 4 + ["SUMMARY"] * 2 + ["PRE"]
    page.close()


def test_runs_can_be_hidden_and_the_axis_made_logarithmic(
    chromium: Any, runs: list[RunFolder], tmp_path: Path
) -> None:
    """With the space bar on the check boxes."""
    page, said = open_page(chromium, tmp_path, runs)
    page.locator("input[data-run='0']").focus()
    page.keyboard.press("Space")
    assert list(drawn(page, "loss")) == ["plain"]
    page.locator("#log").focus()
    page.keyboard.press("Space")
    low = float(page.locator("figure[data-curve=loss] svg").get_attribute("data-y0"))
    assert 10**low == pytest.approx(2.0 + 1.0 / 40)
    assert said == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone_in_both_schemes(
    chromium: Any, runs: list[RunFolder], tmp_path: Path, scheme: str
) -> None:
    """Nothing is wider than the screen, letters of axes are 12 px, text stands out from its ground."""
    page, _ = open_page(
        chromium, tmp_path, runs, viewport={"width": 360, "height": 740}, color_scheme=scheme
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    label = page.locator("figure svg text").first.bounding_box()
    assert label["height"] >= 11
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(*colours) > 7
    for number in range(8):
        shade = page.evaluate(
            f"""() => {{ const probe = document.body.appendChild(document.createElement('p'));
            probe.style.color = 'var(--run-{number})'; return getComputedStyle(probe).color; }}"""
        )
        assert contrast(shade, colours[1]) > 3  # WCAG for graphics
    page.close()


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two rgb() colours."""
    levels = []
    for colour in (one, other):
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_what_the_page_says(chromium: Any, runs: list[RunFolder], tmp_path: Path) -> None:
    """Equation, failure, re-split, saves, predicted against measured, differences; hostile names as text."""
    page, said = open_page(chromium, tmp_path, runs)
    text = page.inner_text("body")
    for words in (
        "12 = 3 per_device × 2 gpus × 2 accumulation",
        "<img src=x onerror=alert(1)> 'a",
        "0: 3 × 2 × 2: start; failed at step 31 after 2 min 00 s; saved at 30",
        "rank 1 ended without a word",
        "1: 1 × 4 × 3 (another split): start; finished at step 60 after 2 min 55 s, from step 30; saved at 60",
        "reserved: 27.9 GiB expected, 26.1 GiB to 33.5 GiB · 30.7 GiB measured",
        "drumline reproduce '",
    ):
        assert words in text, words
    assert said == []
    page.close()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A hundred thousand steps, one of them a spike."""
    folder = make_run(tmp_path_factory.mktemp("long") / "r", [])
    lines = [step_line(n, loss=2.0 + (n * 7919 % 1000) / 1000) for n in range(1, 100_001)]
    lines[61_234]["loss"] = 99.0
    write_lines(folder, lines)
    return folder


def test_a_hundred_thousand_steps(chromium: Any, long_run: RunFolder, tmp_path: Path) -> None:
    """Under 3 MB; the spike, the first and the last step are drawn; it is said how many are."""
    page, said = open_page(chromium, tmp_path, [long_run])
    assert (tmp_path / "report.html").stat().st_size < 3e6
    vertices = drawn(page, "loss")["r"]
    assert len(vertices) <= MOST_POINTS + 4
    assert max(vertices, key=lambda point: point[1]) == [
        pytest.approx(61_235, abs=200),
        pytest.approx(99.0),
    ]
    page.locator("figure").first.focus()
    page.keyboard.press("End")
    assert page.locator(".readout").first.inner_text().startswith("step 100,000: ")
    assert re.search(
        r"r: 1,\d\d\d of 100,000 steps are drawn; every peak is", page.inner_text("body")
    )
    assert said == []
    page.close()


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), max_size=400), st.integers(8, 50))
def test_thinning_keeps_what_was_measured(values: list[float | None], most: int) -> None:
    """Points of the original, in order, with its ends, its least and its greatest."""
    points = [[step, value] for step, value in enumerate(values, start=1)]
    kept = thinned(points, most)
    assert all(point in points for point in kept)
    assert [p[0] for p in kept] == sorted({p[0] for p in kept})
    assert len(kept) <= most + 4
    known = [value for value in values if value is not None]
    if known:
        drawn_values = [point[1] for point in kept if point[1] is not None]
        assert (min(drawn_values), max(drawn_values)) == (min(known), max(known))
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]


def test_it_tells_where_the_time_went(chromium: Any, runs: list[RunFolder], tmp_path: Path) -> None:
    """Shares of the phases over all lines, also of saves after the last step; goodput over both starts; the MFU's median."""
    path = tmp_path / "timed"
    lines: list[dict[str, Any]] = [
        {**step_line(n), "seconds": 3.0, "mfu": 0.3 + n / 1000, "time/forward": 1.0, "time/backward": 1.5, "time/data": 0.5} for n in range(1, 41)
    ]  # fmt: skip
    lines.append({"kind": "event", "step": 40, "time/save": 40.0})
    run = make_run(path, lines)
    run.note(attempts=[attempt(0, "00:00", "02:00", "failed", step=21), attempt(1, "02:10", "04:00", "finished", step=40)], outcome="finished")  # fmt: skip
    page, said = open_page(chromium, tmp_path, [run, runs[1]])
    assert said == []
    told = page.locator("section[aria-label='time of timed'] p").inner_text()
    found = dict(re.findall(r"(\w+) ([\d.]+) %", told))
    assert found == {"backward": "37.5", "forward": "25.0", "save": "25.0", "data": "12.5"}
    facts = page.locator("section[aria-label='timed'] dl").inner_text()
    assert "50% of the time in steps that were kept, 2 starts" in facts
    assert "32.1%, median" in facts
    assert page.locator("section[aria-label='time of plain']").count() == 0
    page.close()
