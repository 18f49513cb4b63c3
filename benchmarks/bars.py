"""A bar chart as SVG, in light and dark, for the tables of benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDE, _LABELS, _STEP = 720, 230, 26
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Bar:
    """A value with its spread, in a group that has a colour of its own."""

    label: str
    value: float
    low: float
    high: float
    group: int = 0


def bars(title: str, values: Sequence[Bar], unit: str, mark: float | None = None) -> str:
    """The chart, a bar a line, with whiskers from low to high; `mark`: a line at this value."""
    top, most = 54, 1.08 * max(max(one.high for one in values), mark or 0.0)
    scale = (_WIDE - _LABELS - 90) / most
    height = top + _STEP * len(values) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<style>svg{color:#222;background:#fff}@media (prefers-color-scheme:dark)"
        "{svg{color:#ddd;background:#1e1e1e}}text{fill:currentColor}</style>",
        f'<title>{escape(title)}</title><text x="16" y="28" font-size="15">{escape(title)}</text>',
    ]
    for number, one in enumerate(values):
        y = top + _STEP * number
        middle, end = y + 9, _LABELS + scale * one.value
        low, high = (_LABELS + scale * value for value in (one.low, one.high))
        parts += [
            f'<text x="{_LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(one.label)}</text>',
            f'<rect x="{_LABELS}" y="{y}" width="{end - _LABELS:.1f}" height="18" '
            f'fill="{_COLOURS[one.group % len(_COLOURS)]}" opacity=".8"/>',
            f'<path d="M{low:.1f},{middle} H{high:.1f}" stroke="currentColor" fill="none"/>',
            f'<text x="{max(end, high) + 6:.1f}" y="{y + 13}">{one.value:.3g} {escape(unit)}</text>',
        ]
    if mark is not None:
        x = _LABELS + scale * mark
        parts.append(f'<path d="M{x:.1f},{top - 8} V{height - 12}" stroke="currentColor" stroke-dasharray="3"/>')  # fmt: skip
    return "\n".join([*parts, "</svg>\n"])
