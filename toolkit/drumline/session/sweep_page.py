"""`drumline plan --sweep`: the sweep as a table, and as one HTML page with a heat map."""

from collections.abc import Iterable
from html import escape

from drumline.plan.model import VERDICT_WORDS, Plan
from drumline.plan.sweep import Cell
from drumline.units import format_bytes


def sweep_table(cells: list[Cell]) -> str:
    """Format the sweep as text: rows are GPU count and per_device, columns strategy and checkpointing."""
    columns = _columns(cells)
    names = [
        f"{strategy}{', checkpointed' if full == 'full' else ''}" for strategy, full in columns
    ]
    widths = [max(12, len(name)) for name in names]
    head = f"{'gpus':>5} {'per_device':>10}  " + "  ".join(
        f"{name:>{width}}" for name, width in zip(names, widths, strict=True)
    )
    rows = [head]
    for gpus, b in _rows(cells):
        found = [_at(cells, gpus, b, column) for column in columns]
        texts = ["" if cell is None else _text(cell) for cell in found]
        line = "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
        rows.append(f"{gpus:>5} {b:>10}  {line}")
    return "\n".join([*rows, "(upper estimate of memory per rank; ? tight, ! does not fit)"])


def _text(cell: Cell) -> str:
    mark = {"does_not_fit": "!", "tight": "?"}.get(cell.verdict, " ")
    return f"{format_bytes(cell.device_high)}{mark}"


def _rows(cells: Iterable[Cell]) -> list[tuple[int, int]]:
    return sorted({(cell.gpus, cell.per_device) for cell in cells})


def _columns(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.strategy, cell.checkpointing) for cell in cells))


def _at(cells: Iterable[Cell], gpus: int, b: int, column: tuple[str, str]) -> Cell | None:
    for cell in cells:
        if (cell.gpus, cell.per_device, cell.strategy, cell.checkpointing) == (gpus, b, *column):
            return cell
    return None


def sweep_page(plan: Plan, cells: list[Cell]) -> str:
    """Render one self-contained HTML page: each cell shows peak memory, coloured by share of the device."""
    title = f"{plan.recipe.recipe}: memory at effective batch {plan.batch.effective:,}"
    body = f"<h1>{escape(title)}</h1>\n{heat_map(plan, cells)}"
    return page(title, f"h1 {{ font-size: 1.2rem; }}\n{HEAT_MAP_STYLE}", body)


def page(title: str, style: str, body: str) -> str:
    """A self-contained page; `title`: plain text."""
    return _PAGE.format(title=escape(title), style=style, body=body)


def heat_map(plan: Plan, cells: list[Cell]) -> str:
    """The table of a sweep as HTML, with a line that says how to read it; HEAT_MAP_STYLE colours it."""
    capacity = plan.memory.capacity
    columns = _columns(cells)
    head = "".join(
        f'<th scope="col">{escape(strategy)}{_CHECKPOINTED.get(policy, "")}</th>'
        for strategy, policy in columns
    )
    body = []
    for gpus, b in _rows(cells):
        tds = []
        for column in columns:
            cell = _at(cells, gpus, b, column)
            tds.append("<td></td>" if cell is None else _cell(cell, capacity, plan))
        k = plan.batch.effective // gpus // b
        equation = f"{b} × {gpus} × {k}"
        body.append(f'<tr><th scope="row">{equation}</th>{"".join(tds)}</tr>')
    of = f" of {format_bytes(capacity)}" if capacity else ""
    device = escape(f"{plan.recipe.cluster.gpu_name}{of} per rank, {plan.recipe.precision}")
    return _HEAT_MAP.format(device=device, head=head, body="\n".join(body))


def _cell(cell: Cell, capacity: int | None, plan: Plan) -> str:
    share = cell.device_high / capacity if capacity else 0.0
    hue = 120 - round(120 * min(1.0, share))  # green when empty, red when full
    now = (plan.batch.per_device, plan.batch.gpus, plan.recipe.strategy.name,
           plan.recipe.model.activation_checkpointing)  # fmt: skip
    is_now = now == (cell.per_device, cell.gpus, cell.strategy, cell.checkpointing)
    classes = " ".join([cell.verdict, *(["now"] if is_now else [])])
    return (
        f'<td class="{classes}" style="--hue:{hue}" title="{VERDICT_WORDS[cell.verdict]}, {share:.0%}">'
        f"{escape(format_bytes(cell.device_high))}</td>"
    )


_CHECKPOINTED = {"full": "<br>checkpointed", "selective": "<br>selective"}
HEAT_MAP_STYLE = """
.heat-map { overflow-x: auto; }
.heat-map table { border-collapse: collapse; }
.heat-map th, .heat-map td { padding: .35rem .7rem; text-align: right; white-space: nowrap; }
.heat-map td { background: hsl(var(--hue) 70% 78%); color: #111; font-variant-numeric: tabular-nums; }
.heat-map td:empty { background: none; }
.heat-map td.does_not_fit { text-decoration: line-through; }
.heat-map td.tight { font-style: italic; }
.heat-map td.now { outline: 3px solid currentColor; outline-offset: -3px; font-weight: 700; }
@media (prefers-color-scheme: dark) { .heat-map td { background: hsl(var(--hue) 45% 30%); color: #eee; } }
"""
_HEAT_MAP = """<p>{device}. Rows: per_device × gpus × accumulation.
Italic: tight. Struck through: does not fit. Outlined: the recipe.</p>
<div class="heat-map">
<table>
<thead><tr><th scope="col">split</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ margin: 1.2rem; }}
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
