"""Formats a plan as a table of plain text. Does not import rich, so that a dry run stays fast."""

import math
import textwrap
from pathlib import Path
from typing import Any

from drumline.files import without_undefined
from drumline.memory.ranges import ByteRange
from drumline.plan.advise import change_words
from drumline.plan.model import VERDICT_WORDS, Plan, StartFacts, TimeFacts
from drumline.plan.schedule import rate_facts
from drumline.session.memory_bars import memory_bars
from drumline.units import format_bytes, format_count, format_duration, format_flops, format_number

_WIDTH = 100
_LABEL = 11


def plan_table(plan: Plan) -> str:
    """Return the plan as text, one labelled paragraph per topic."""
    rows = (_row(label, text) for label, text in topics(plan))
    return "\n".join([plan.recipe.recipe, "", *rows])


def topics(plan: Plan) -> list[tuple[str, str]]:
    """Labels of a plan's topics, and their text."""
    rows = [
        *([("start", _start(plan.start))] if plan.start else []),
        ("batch", _batch(plan)),
        ("steps", _steps(plan)),
        ("schedule", _schedule(plan)),
        ("memory", _memory(plan)),
        *([("time", _time(plan.time))] if plan.time else []),
        ("model", _model(plan)),
        ("split", f"{plan.split_invariance.level}: {plan.split_invariance.why}"),
    ]
    if plan.data.mixture:
        rows.insert(2, ("sources", _sources(plan)))
    if plan.data.row_lengths:
        rows.insert(2, ("rows", _lengths(plan, plan.data.row_lengths)))
    rows += [("advice", _advice(plan))] if plan.advice else []
    rows += [("warning", warning) for warning in plan.warnings]
    return rows


def _row(label: str, text: str) -> str:
    indent = " " * (_LABEL + 2)
    lines = []
    for part in text.split("\n"):
        lines += textwrap.wrap(part, _WIDTH - len(indent), break_on_hyphens=False) or [""]
    return f"  {label:<{_LABEL}}" + f"\n{indent}".join(lines)


def _start(start: StartFacts) -> str:
    """What the run takes over from another one."""
    if start.what == "weights":
        return f"the weights of step {start.step:,} of {start.run}"
    data = "its data go on" if start.continues_data else "the data begin anew"
    return f"the whole state of step {start.step:,} of {start.run}; {data}"


def _batch(plan: Plan) -> str:
    b = plan.batch
    nodes = "" if b.nodes == 1 else f", {b.nodes} nodes"
    before = "".join(
        f"\n{stage.effective:,} = {stage.per_device:,} × {b.gpus} × {stage.accumulation} up to step "
        f"{stage.until_step:,}"
        for stage in b.ramp
    )
    return (
        f"{b.effective:,} = {b.per_device:,} per_device × {b.gpus} gpus × {b.accumulation} accumulation"
        f"  ({plan.recipe.cluster.gpu_name}{nodes}, {plan.recipe.strategy.name}, {plan.recipe.precision})"
        f"{before}"
    )


def _steps(plan: Plan) -> str:
    s = plan.steps
    about = "about " if plan.data.row_lengths else ""
    tokens = f", {about}{s.tokens_per_step:,} tokens a step" if s.tokens_per_step else ""
    own = s.total - plan.first_step + 1
    forwards = "forward" if s.forwards_per_step == 1 else "forwards"
    after = f" (steps {plan.first_step:,} to {s.total:,})" if own < s.total else ""
    first = f"{own:,} optimizer steps{after}{tokens}, {s.forwards_per_step} {forwards} a step"
    if s.samples is None:
        return f"{first}\nsamples and steps an epoch are unknown until `drumline prepare`"
    short = ""
    if s.last_batch != plan.batch.effective and plan.batch.remainder != "drop":
        short = f", the last of {s.last_batch:,}"
    return f"{first}\n{s.samples:,} samples: {s.per_epoch:,} steps an epoch{short}; {s.epochs:g} epochs"


def _lengths(plan: Plan, lengths: list[int]) -> str:
    """How long the training rows are, and what part of the tokens is padding."""
    size, share = plan.batch.per_device, plan.data.padding(plan.batch.per_device)
    padded = f"; about {share:.0%} padding at {size:,} per_device" if share is not None else ""
    return (
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, half of them at most {lengths[50]:,}, nine tenths at "
        f"most {lengths[90]:,}{padded}"
    )


def _sources(plan: Plan) -> str:
    """How many samples of an epoch each source of a mixture gives, and how often its rows are seen."""
    samples, found = sum(own.share for own in plan.data.mixture), []
    for own in plan.data.mixture:
        seen = ""
        if own.rows and plan.steps.samples is not None:
            clock = plan.clock()
            taken = clock.consumed(plan.steps.total) - clock.start.consumed
            times = own.share * taken / samples / own.rows
            seen = f" of {own.rows:,} rows; a row is seen {times:.2g} times in this run"
        found.append(
            f"{own.label}: {own.share:,} samples an epoch ({own.share / samples:.2%}){seen}"
        )
    return "\n".join(found)


def _schedule(plan: Plan) -> str:
    c = plan.schedule
    derived = ""
    if c.peak_lr != c.base_lr:
        scaling = plan.recipe.optimizer.lr_scaling
        derived = (
            f" (derived: {c.base_lr:g} × {plan.batch.effective}/{scaling.reference_batch}, "
            f"{scaling.rule})"
        )
    facts = rate_facts(c, plan.clock() if c.unit == "epoch" else None, plan.first_step)
    warmup = f"warm-up {c.warmup_steps:,} steps, " if c.warmup_steps else ""
    held = ", held within an epoch" if c.unit == "epoch" else ""
    beyond = f"; the schedule is one of {c.total:,} steps" if c.run is not None else ""
    begin = plan.first_step
    first = f"{facts.first:g} at step {begin:,}, " if facts.highest_step > begin else ""
    highest = "peak" if math.isclose(facts.highest, c.peak_lr) else "at most"
    return (
        f"{c.name}: {warmup}{first}{highest} {facts.highest:g} at step {facts.highest_step:,}{derived}, "
        f"{facts.last:g} at step {c.last:,}{held}{beyond}"
    )


def _memory(plan: Plan) -> str:
    m = plan.memory
    if m.device is None or m.allocated is None or m.reserved is None:
        return "unknown"
    verdict = VERDICT_WORDS[m.verdict]
    verdict = verdict.upper() if m.fits is False else verdict
    capacity = f" of {format_bytes(m.capacity)}" if m.capacity else ""
    rows = [
        f"{verdict}: up to {format_bytes(m.device.high)}{capacity} per rank ({m.method})",
        *(_range(name, getattr(m, name)) for name in ("allocated", "reserved", "device")),
    ]
    if m.allocated == m.device:  # on a CPU the three ranges are the same
        del rows[2:]
    rows += memory_bars(m)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in m.parts.items() if size)
    rows.append(f"peak in {m.peak_phase}: {parts}")
    if "rows" in m.basis:
        rows.append(f"for the data as prepared: {m.basis['rows']}")
    if m.host_bytes:
        rows.append(f"{format_bytes(m.host_bytes)} of the host's memory per rank")
    return "\n".join(rows)


def _time(time: TimeFacts) -> str:
    """Seconds of a step and what they are spent on, throughput, and what the whole run takes."""
    step, hours = time.step_s, time.hours
    rate = f"{format_number(time.samples_per_s)} samples/s"
    if time.tokens_per_s:
        rate = f"{time.tokens_per_s:,.0f} tokens/s"
    mfu = f", MFU {time.mfu:.0%}" if time.mfu else ""
    parts = sorted(time.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {seconds / step.expected:.0%}" for name, seconds in parts
                       if seconds >= step.expected / 100)  # fmt: skip
    energy = f", up to {format_number(time.energy_kwh)} kWh" if time.energy_kwh else ""
    cost = f", {time.cost:,.0f} at the site's price" if time.cost is not None else ""
    whole = [format_duration(3600 * value) for value in (hours.expected, hours.low, hours.high)]
    beside = ", ".join(_beside(name, seconds) for name, seconds in time.beside.items())
    return (
        f"{step.expected:.3g} s a step ({step.low:.3g} to {step.high:.3g}), {rate}{mfu}\n"
        f"{whole[0]} ({whole[1]} to {whole[2]}): {format_number(time.gpu_hours)} GPU-hours{energy}{cost}\n"
        f"{shares}\nbeside the steps: {beside}\nby {time.basis}"
    )


def _beside(name: str, seconds: float | None) -> str:
    """What a run spends beside its steps, in words."""
    if seconds is None:
        return f"{name} not counted (its rows are not prepared)"
    return f"{name} {format_duration(seconds)}"


def _range(name: str, three: ByteRange) -> str:
    low, expected, high = (format_bytes(n) for n in (three.low, three.expected, three.high))
    return f"{name:<10} {expected:>9}  ({low} to {high})"


def _model(plan: Plan) -> str:
    c, model = plan.cost, plan.recipe.model
    name = model.architecture or model.factory or model.name or model.path or ""
    loaded = ""
    if c.weights_bytes and c.load_seconds:
        loaded = (
            f"\n{format_bytes(c.weights_bytes)} of weights, each block read by one rank: about "
        )
        loaded += f"{max(1, round(c.load_seconds)):,} s"
    if c.parameters is None:
        return name + loaded
    flops = f", {format_flops(c.flops_per_step)} a step" if c.flops_per_step else ""
    saved = f", {format_bytes(c.checkpoint_bytes)} a checkpoint" if c.checkpoint_bytes else ""
    if saved and c.frozen_bytes:
        saved += f" (of which {format_bytes(c.frozen_bytes)}, frozen, are written once)"
    trained = ""
    if c.trained is not None and c.trained != c.parameters:
        share = c.trained / c.parameters
        trained = f", {format_count(c.trained)} of them trained ({share:.2%})"
    return f"{name}, {format_count(c.parameters)} parameters{trained}{flops}{saved}{loaded}"


def _advice(plan: Plan) -> str:
    found = {item.verdict for item in plan.advice}
    if plan.memory.verdict == "fits":
        head = "room is left for:"
    elif "fits" in found:
        head = "this would fit:"
    elif plan.memory.verdict == "does_not_fit" and "tight" in found:
        head = "this would be tight:"
    else:
        head = "nothing known fits; nearest:"
    rows = [
        f"{change_words(item.change)}\n  -> {format_bytes(item.device_high)}, about "
        f"{item.cost:.2f} × the GPU time: {item.why}"
        for item in plan.advice
    ]
    return "\n".join([head, *rows])


def run_facts(
    run: Path | None,
    steps: int,
    loss: float | None,
    evaluation: dict[str, float] | None,
    seconds: float,
    outcome: str,
) -> dict[str, Any]:
    """Return the object that `--json` prints; a loss or metric that is not finite is null."""
    return {
        "run": str(run) if run else None,
        "steps": steps,
        "loss": without_undefined(loss),
        "eval": without_undefined(evaluation),
        "seconds": round(seconds, 3),
        "outcome": outcome,
    }
