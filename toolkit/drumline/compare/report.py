"""Renders one or several runs as a self-contained HTML page, without network access or a build step."""

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from drumline.checkpoint.weights import identity_of
from drumline.compare.differences import environment_differences, recipe_differences
from drumline.compare.logged import Logged
from drumline.plan.noise import logged_noise, noise_words
from drumline.runs.environment import THAT_TRAIN
from drumline.units import format_bytes, format_duration

CURVES = {
    "loss": ("Loss", "nats"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Throughput", "tokens/s"),
}
MOST_POINTS = 2000
"""Approximate maximum per curve; beyond it, each bucket keeps its first, last, smallest and largest point."""

_TEMPLATE = Path(__file__).with_name("report.html")
_COMPARED = 2
_TOTALS = ("allocated", "reserved", "device")
"""The three memory totals; on a CPU they are equal and only the first is shown."""


def write_report(logged: list[Logged]) -> str:
    """Render the page as HTML text."""
    pages = [_page(run, number) for number, run in enumerate(logged)]
    data = {"runs": [page.pop("data") for page in pages], "curves": CURVES}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(page["name"] for page in pages),
        runs=pages,
        curves=CURVES,
        differences=_differences(logged),
        data=_script_safe(data),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def thinned(points: list[list[Any]], most: int = MOST_POINTS) -> list[list[Any]]:
    """Thin [step, value] points to about `most`; all are measured points, and no peak is lost."""
    if len(points) <= most:
        return points
    size = -(-len(points) * 4 // most)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        known = [point for point in bucket if point[1] is not None]
        ends = [bucket[0], bucket[-1]]
        if known:
            ends += [min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])]
        kept += [list(point) for point in sorted({(step, value) for step, value in ends})]
    return kept


def _page(run: Logged, number: int) -> dict[str, Any]:
    """Template variables of one run; `data` is what the page's script draws."""
    record = run.record
    curves = {
        name: thinned([[line["step"], line.get(name)] for line in run.steps]) for name in CURVES
    }
    name = Path(run.name).name
    return {
        "name": name,
        "quoted": shlex.quote(run.name),
        "number": number,
        "outcome": record.get("outcome") or "not ended",
        "equation": _equation(record),
        "facts": _facts(run),
        "memory": _memory(record),
        "times": _times(run),
        "timeline": _timeline(record, run.events),
        "commands": _commands(run.events),
        "environment": _environment(record),
        "verdict": (record.get("reproduced") or {}).get("words"),
        "parent": (record.get("parent") or {}).get("run"),
        "noise": _noise(run),
        "shown": {key: len(points) for key, points in curves.items()},
        "steps": len(run.steps),
        "last": run.last_step or 1,
        "data": {
            "name": name,
            "curves": curves,
            "evaluations": [[line["step"], line["eval/loss"]] for line in run.evaluations],
        },
    }


def _equation(record: dict[str, Any]) -> str:
    batch = (record.get("plan") or {}).get("batch")
    if not batch:
        return "not recorded"
    return (
        f"{batch['effective']:,} = {batch['per_device']:,} per_device × {batch['gpus']} gpus × "
        f"{batch['accumulation']} accumulation"
    )


def _facts(run: Logged) -> list[tuple[str, str]]:
    plan, recipe = run.record.get("plan") or {}, run.recipe
    steps, last = plan.get("steps") or {}, run.steps[-1] if run.steps else {}
    seconds = sum(line.get("seconds") or 0.0 for line in run.steps)
    facts = [
        ("steps", f"{last.get('step', 0):,} of {steps.get('total') or 0:,}"),
        ("final loss", _number(last.get("loss"))),
        ("time in steps", format_duration(seconds)),
        ("strategy", f"{recipe['strategy']['name']} through {recipe['launch']['launcher']}"),
        ("precision", recipe["precision"]),
        ("schedule", recipe["schedule"]["name"]),
        ("data", str((run.record.get("data") or {}).get("fingerprint"))),
        ("split", (plan.get("split_invariance") or {}).get("level") or ""),
    ]
    facts += [("goodput", _goodput(run)), ("MFU", _mfu(run))]
    if run.evaluations:
        facts.insert(2, ("last validation loss", _number(run.evaluations[-1]["eval/loss"])))
    return [(name, value) for name, value in facts if value]


def _times(run: Logged) -> list[dict[str, Any]]:
    """Where the time went, by phase, in percent of all that was measured; the longest first."""
    spent: dict[str, float] = {}
    for line in (*run.steps, *run.events):
        for key, value in line.items():
            if key.startswith("time/") and isinstance(value, int | float):
                spent[key[5:]] = spent.get(key[5:], 0.0) + value
    whole = sum(spent.values())
    return [
        {"name": name, "share": 100 * seconds / whole, "words": format_duration(seconds)}
        for name, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
        if seconds and whole
    ]


def _goodput(run: Logged) -> str:
    """The share of the time between first start and last end that went into steps that were kept."""
    attempts = run.record.get("attempts") or []
    ended = [_time(one["ended"]) for one in attempts if one["ended"]]
    if not ended or not run.steps:
        return ""
    span = max(ended) - min(_time(one["started"]) for one in attempts)
    seconds = sum(line.get("seconds") or 0.0 for line in run.steps)
    starts = f", {len(attempts)} starts" if len(attempts) > 1 else ""
    return (
        f"{min(1.0, seconds / span):.0%} of the time in steps that were kept{starts}"
        if span > 0
        else ""
    )


def _mfu(run: Logged) -> str:
    """The median share of the device's peak that the model's own operations made use of."""
    known = sorted(line["mfu"] for line in run.steps if line.get("mfu") is not None)
    return f"{known[len(known) // 2]:.1%}, median" if known else ""


def _noise(run: Logged) -> str:
    """Describe what the logged gradient noise says about a larger batch."""
    batch = (run.record.get("plan") or {}).get("batch")
    found = logged_noise(run.steps[-1]) if run.steps else None
    return noise_words(found, batch["effective"], batch["accumulation"]) if found and batch else ""


def _memory(record: dict[str, Any]) -> dict[str, Any] | None:
    """Predicted and measured totals in percent of the largest one shown; parts in percent of their sum."""
    memory = (record.get("plan") or {}).get("memory") or {}
    if not memory.get("device"):
        return None
    measured: dict[str, Any] = {}
    for attempt in record.get("attempts") or []:
        measured = (attempt.get("memory") or {}).get("measured") or measured
    widest = max(memory["device"]["high"], *(measured.values() or [0]), 1)
    totals = [
        {
            "name": name,
            "low": 100 * memory[name]["low"] / widest,
            "range": 100 * (memory[name]["high"] - memory[name]["low"]) / widest,
            "measured": 100 * measured[name] / widest if measured else None,
            "words": _total_words(memory[name], measured.get(name)),
        }
        for name in (_TOTALS[:1] if memory["allocated"] == memory["device"] else _TOTALS)
    ]
    whole = sum(memory["parts"].values()) or 1
    parts = [
        {"name": name, "share": 100 * size / whole, "words": format_bytes(size)}
        for name, size in memory["parts"].items()
        if size
    ]
    most = max((memory.get("phases") or {}).values(), default=0)
    phases = [
        {"name": name, "share": 100 * size / most, "words": format_bytes(size)}
        for name, size in (memory.get("phases") or {}).items()
        if size
    ]
    return {"totals": totals, "parts": parts, "phases": phases,
            "phase": memory["peak_phase"], "method": memory["method"],
            "capacity": format_bytes(memory["capacity"]) if memory.get("capacity") else None}  # fmt: skip


def _total_words(three: dict[str, int], measured: int | None) -> str:
    expected, low, high = (format_bytes(three[name]) for name in ("expected", "low", "high"))
    found = f"{format_bytes(measured)} measured" if measured else "not measured"
    return f"{expected} expected, {low} to {high} · {found}"


def _timeline(record: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per attempt: split, cause, saves and end, with times in percent of the whole run."""
    attempts = record.get("attempts") or []
    known = [_time(attempt["started"]) for attempt in attempts]
    known += [_time(attempt["ended"]) for attempt in attempts if attempt["ended"]]
    known += [line["checkpoint/saved"] for line in events if "checkpoint/saved" in line]
    if not known:
        return []
    first, span = min(known), max(1.0, max(known) - min(known))
    rows, before = [], None
    for attempt in attempts:
        start = _time(attempt["started"])
        end = _time(attempt["ended"]) if attempt["ended"] else max(known)
        split = " × ".join(str(n) for n in attempt["split"].values())
        saves = [
            {"step": line["step"], "at": 100 * (line["checkpoint/saved"] - first) / span}
            for line in events
            if start <= line.get("checkpoint/saved", -1) < end + 1
        ]
        rows.append(
            {
                "number": attempt["number"],
                "cause": attempt["cause"],
                "split": split,
                "is_resplit": before is not None and before != attempt["split"],
                "outcome": attempt["outcome"] or "not ended",
                "message": attempt.get("message") or "",
                "step": attempt.get("step"),
                "from_step": attempt.get("from_step", 0),
                "left": 100 * (start - first) / span,
                "width": max(0.5, 100 * (end - start) / span),
                "took": format_duration(end - start),
                "saves": saves,
                "saved": ", ".join(f"{save['step']:,}" for save in saves),
            }
        )
        before = attempt["split"]
    return rows


def _commands(events: list[dict[str, Any]]) -> list[tuple[int, str, str, bool]]:
    """Step, name, numbers and failure of every command that was run on a checkpoint."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in events:
        for key, value in line.items():
            if key.startswith("after/"):
                _, name, number = key.split("/", 2)
                found.setdefault((line["step"], name), {})[number] = value
    rows = []
    for (step, name), values in sorted(found.items()):
        code = values.pop("exit_code", None)
        words = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        failed = f"exit code {code}" if code else ""
        rows.append((step, name, ", ".join(filter(None, (words, failed))) or "done", bool(code)))
    return rows


def _environment(record: dict[str, Any]) -> list[tuple[str, str]]:
    versions, hardware = record.get("versions") or {}, record.get("hardware") or {}
    code = record.get("code") or {}
    gpus = ", ".join(
        f"{gpu['name']} (driver {gpu['driver']})" for gpu in hardware.get("gpus") or []
    )
    changed = len((code.get("diff") or "").split("diff --git ")) - 1
    beside = len(code.get("untracked") or {})
    rows = [
        ("host", hardware.get("host")),
        ("platform", hardware.get("platform")),
        ("processor", hardware.get("cpu")),
        ("GPUs", gpus or "none"),
        ("container", record.get("container")),
        ("commit", code.get("commit")),
        (
            "changed since",
            f"{changed} files changed, {beside} untracked" if changed or beside else "nothing",
        ),
        ("command", " ".join(record.get("command") or [])),
        *((name, versions.get(name)) for name in THAT_TRAIN),
        ("recipe_sha256", record.get("recipe_sha256")),
        ("training_sha256", record.get("training_sha256")),
        ("weights", identity_of(record.get("weights") or {})),
    ]
    return [(name, value) for name, value in rows if value]


def _differences(logged: list[Logged]) -> list[tuple[str, str, str]]:
    """Recipe and environment differences, if exactly two runs are shown."""
    if len(logged) != _COMPARED:
        return []
    a, b = logged
    found = recipe_differences(a.recipe, b.recipe) | environment_differences(a.record, b.record)
    return [(name, str(x), str(y)) for name, (x, y) in found.items()]


def _script_safe(data: Any) -> str:
    """Encode as JSON that cannot close the surrounding script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
