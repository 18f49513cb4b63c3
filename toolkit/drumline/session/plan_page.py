"""A plan as HTML: the batch equation, memory by phase as bars, and the heat map of other splits."""

from html import escape
from pathlib import Path

from drumline.plan.model import VERDICT_WORDS, Plan
from drumline.plan.sweep import Cell
from drumline.session.show import topics
from drumline.session.sweep_page import HEAT_MAP_STYLE, heat_map, page
from drumline.units import format_bytes


def plan_page(plan: Plan, cells: list[Cell]) -> str:
    """One self-contained page; `cells`: of a sweep, or none."""
    return page(plan.recipe.recipe, "", fragment(plan, cells))


def fragment(plan: Plan, cells: list[Cell]) -> str:
    """The page without its frame, for a notebook."""
    parts = [
        f"<style>{_STYLE}{HEAT_MAP_STYLE}</style>",
        f"<h2>{escape(plan.recipe.recipe)}</h2>",
        f'<p class="equation">{_equation(plan)}</p>',
        _memory(plan),
        _topics(plan),
    ]
    if cells:
        parts.append(f"<h3>The same training at other splits</h3>{heat_map(plan, cells)}")
    return f'<div class="drumline-plan">{"".join(parts)}</div>'


def _equation(plan: Plan) -> str:
    b = plan.batch
    names = ("effective", "per device", "GPUs", "accumulation")
    numbers = (b.effective, b.per_device, b.gpus, b.accumulation)
    shown = [
        f"<span><b>{number:,}</b><small>{name}</small></span>"
        for name, number in zip(names, numbers, strict=True)
    ]
    return f"{shown[0]} = {' × '.join(shown[1:])}"


def _memory(plan: Plan) -> str:
    """A bar for each phase, a stacked one for the parts of the peak, and a mark where the device ends."""
    m = plan.memory
    if m.device is None:
        return f"<p>memory: unknown. {escape(m.why)}</p>"
    whole = max(m.capacity or 0, m.device.high)
    verdict = escape(VERDICT_WORDS[m.verdict])
    of = f" of {format_bytes(m.capacity)}" if m.capacity else ""
    rows = [
        _row(f"{name}", _piece(size, whole, 0), size) for name, size in m.phases.items() if size
    ]
    parts = [(name, size) for name, size in m.parts.items() if size]
    stacked = "".join(
        _piece(size, whole, number, name) for number, (name, size) in enumerate(parts)
    )
    rows.append(_row(f"peak: {m.peak_phase}", stacked, sum(size for _, size in parts)))
    low, width = m.device.low / whole, (m.device.high - m.device.low) / whole
    spread = (
        f'<i class="range" style="left:{low:.2%};width:{width:.2%}"></i>'
        f'<i class="expected" style="left:{m.device.expected / whole:.2%}"></i>'
    )
    rows.append(_row("device", spread, m.device.expected))
    mark = ""
    if m.capacity and m.capacity < whole:
        mark = f"<p>The device ends at {m.capacity / whole:.0%} of the width.</p>"
    legend = "".join(
        f'<li><i class="part-{number % 8}"></i>{escape(name)} {format_bytes(size)}</li>'
        for number, (name, size) in enumerate(parts)
    )
    up_to = f"up to {format_bytes(m.device.high)}{of} per rank ({m.method})"
    head = f'<p class="{m.verdict}">memory: <b>{verdict}</b>, {up_to}</p>'
    return f'{head}<div class="bars">{"".join(rows)}</div>{mark}<ul class="legend">{legend}</ul>'


def _row(name: str, inner: str, size: int) -> str:
    return (
        f'<div class="bar-row"><span>{escape(name)}</span><div class="bar">{inner}</div>'
        f"<span>{format_bytes(size)}</span></div>"
    )


def _piece(size: int, whole: int, number: int, name: str = "") -> str:
    title = f' title="{escape(name)}: {format_bytes(size)}"' if name else ""
    return f'<i class="part-{number % 8}" style="width:{size / whole:.2%}"{title}></i>'


def _topics(plan: Plan) -> str:
    rows = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text).replace(chr(10), '<br>')}</dd>"
        for label, text in topics(plan)
        if label not in ("batch", "memory")
    )
    return f"<dl>{rows}</dl>"


_STYLE = (Path(__file__).parent / "plan_page.css").read_text(encoding="utf-8")
