"""The estimated time of a step against published throughputs: a table of errors and a figure.

    python benchmarks/throughput.py

Reads tests/fixtures/published/throughput.csv (llm-foundry's table: tokens per second and GPU) and plans each of its runs;
writes docs/figures/throughput.svg. No GPU and no torch. A few seconds on two cores.
"""

import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/distributed"), str(ROOT / "tests/plan")]

from test_throughput import published, published_rate

COLOURS = {"h100_80gb": "#d55e00", "a100_80gb": "#0072b2", "a100_40gb": "#009e73"}
SIZE, MARGIN = 540, 84
LEAST, MOST = 3e2, 2e5


def place(value: float) -> float:
    """Pixels from the axis, on a logarithmic scale."""
    return (SIZE - 2 * MARGIN) * math.log(value / LEAST) / math.log(MOST / LEAST)


def figure() -> str:
    """An SVG of estimated over published tokens per second and GPU, with a band of 25 %."""
    left, bottom, end = MARGIN, SIZE - MARGIN, place(MOST)
    up = place(LEAST * 1.25)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE + 110} {SIZE}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        "<style>svg{color:#222;background:#fff}@media (prefers-color-scheme:dark){svg{color:#ddd;background:#1e1e1e}}text{fill:currentColor}</style>",
        f'<title>Estimated against published throughput</title><text x="{left}" y="28" font-size="15">Tokens per second and GPU: estimated against published</text>',
        f'<polygon points="{left},{bottom - up:.1f} {left + end - up:.1f},{bottom - end:.1f} {left + end:.1f},{bottom - end:.1f} {left + end:.1f},{bottom - end + up:.1f} {left + up:.1f},{bottom} {left},{bottom}" fill="currentColor" opacity=".08"/>',
        f'<line x1="{left}" y1="{bottom}" x2="{left + end:.1f}" y2="{bottom - end:.1f}" stroke="currentColor" opacity=".4"/>',
        f'<text x="{left + end / 2:.0f}" y="{SIZE - 14}" text-anchor="middle">published</text>',
        f'<text transform="translate(14 {bottom - end / 2:.0f}) rotate(-90)" text-anchor="middle">estimated</text>',
    ]
    for tick in (1e3, 1e4, 1e5):
        at = place(tick)
        parts.append(f'<text x="{left + at:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:,.0f}</text>')  # fmt: skip
        parts.append(f'<text x="{left - 6}" y="{bottom - at + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')  # fmt: skip
    for row, ratio in published():
        rate = published_rate(row)
        x, y = left + place(rate), bottom - place(rate * ratio)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[row["GPU"]]}" opacity=".75"/>')  # fmt: skip
    for number, (name, colour) in enumerate(COLOURS.items()):
        y = MARGIN + 20 * number
        parts.append(f'<circle cx="{SIZE}" cy="{y}" r="5" fill="{colour}"/><text x="{SIZE + 12}" y="{y + 4}">{name.replace("_", " ")}</text>')  # fmt: skip
    parts.append(f'<text x="{SIZE - 5}" y="{MARGIN + 64}">grey: within 25 %</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Print the table, write the figure."""
    print(
        "| card | runs | median error | within 10 % | within 25 % | worst |\n|---|---|---|---|---|---|"
    )
    for name in (*COLOURS, "all"):
        errors = [abs(ratio - 1) for row, ratio in published() if name in (row["GPU"], "all")]
        shares = [sum(error <= limit for error in errors) / len(errors) for limit in (0.1, 0.25)]
        print(f"| {name.replace('_', '-')} | {len(errors)} | {statistics.median(errors):.1%} | {shares[0]:.0%} | {shares[1]:.0%} | {max(errors):.0%} |")  # fmt: skip
    (ROOT / "docs/figures/throughput.svg").write_text(figure())


if __name__ == "__main__":
    main()
