"""How long does `drumline report` take for 100,000 steps, how large is its page, how smooth in the browser?

python benchmarks/report.py
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT / "toolkit"),
    str(ROOT / "launchers"),
    str(ROOT / "tests"),
    str(ROOT / "tests/runs"),
]

from logged_runs import make_run, step_line, write_lines

STEPS = 100_000
ROUNDS = 5
MOVES = 200


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_run(Path(name) / "r", [])
        write_lines(
            folder, [step_line(n, loss=2 + (n * 7919 % 1000) / 1000) for n in range(1, STEPS + 1)]
        )
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            command = [sys.executable, "-m", "drumline.cli", "report", str(folder.path)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        page = folder.path / "report.html"
        print(f"{STEPS:,} steps, metrics.jsonl {folder.metrics_file.stat().st_size / 1e6:.1f} MB")
        print(
            f"report      {statistics.median(seconds):.2f} s (median of {ROUNDS}, process included)"
        )
        print(f"page        {page.stat().st_size / 1e6:.2f} MB")
        if shutil.which("chromium"):
            print(f"in Chromium {json.dumps(in_browser(page))}")


def in_browser(page: Path) -> dict[str, float]:
    """Milliseconds to draw all charts once, and of a move of the pointer: median and worst."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page()
        tab.goto(page.as_uri())
        times = tab.evaluate(
            """async moves => {
              const timed = async work => {
                const began = performance.now(); work();
                await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
                return performance.now() - began; };
              const draws = [], told = [];
              for (let n = 0; n < 10; n++) draws.push(await timed(redraw));
              for (let n = 0; n < moves; n++) told.push(await timed(() => tell(figures[0], n * 500)));
              return {draws, told}; }""",
            MOVES,
        )
        browser.close()
    return {
        "redraw_ms": round(statistics.median(times["draws"]), 1),
        "move_ms": round(statistics.median(times["told"]), 1),
        "worst_move_ms": round(max(times["told"]), 1),
    }


if __name__ == "__main__":
    main()
