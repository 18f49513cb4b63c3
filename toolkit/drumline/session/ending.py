"""Prints how a run ended and what to do next."""

import shlex
import sys
from pathlib import Path

from drumline.metrics_file import last_line
from drumline.plan.model import Plan
from drumline.plan.noise import logged_noise, noise_words
from drumline.runs.folder import RunFolder
from drumline.runs.step_times import time_words
from drumline.supervise.outcome import Result
from drumline.units import format_duration


def report_end(folder: RunFolder, plan: Plan, result: Result, seconds: float) -> None:
    """Print how a run ended, its folder, and the next command, on stderr."""
    shown = shlex.quote(str(_shortest(folder.path)))
    words = f"{result.outcome} at step {result.step:,} after {format_duration(seconds)}"
    if result.loss is not None:
        words += f", loss {result.loss:.4f}"
    for name, value in (result.evaluation or {}).items():
        words += f", {name} {value:.4f}"
    print(f"\n{words}", file=sys.stderr)
    if result.message:
        print(result.message, file=sys.stderr)
    attempts = folder.read_record()["attempts"]
    if attempts and (words := time_words(attempts[-1].get("time"), plan)):
        print(words, file=sys.stderr)
    line = last_line(folder.metrics_file, lambda line: "noise_scale" in line)
    if noise := logged_noise(line or {}):
        print(noise_words(noise, plan.batch.effective, plan.batch.accumulation), file=sys.stderr)
    print(f"run   {shown} (metrics.jsonl has a line for every step)", file=sys.stderr)
    if result.outcome == "finished":
        batch = plan.batch
        gpus = 2 * batch.gpus if batch.effective % (2 * batch.gpus) == 0 else 1
        print(
            f"next  drumline plan {shown} --gpus {gpus}   {_promise(plan)}",
            file=sys.stderr,
        )
    else:
        command = "doctor" if result.kind == "CheckpointError" else "resume"
        print(f"next  drumline {command} {shown}", file=sys.stderr)


def _promise(plan: Plan) -> str:
    if plan.split_invariance.level == "rounding":
        return "the same training, split otherwise"
    return "the same samples, split otherwise (see its split line)"


def _shortest(path: Path) -> Path:
    try:
        short = path.relative_to(Path.cwd())
    except ValueError:
        return path
    return path if short == Path() else short
