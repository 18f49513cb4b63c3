"""Attempt after attempt on this machine, with progress on stderr: what run, resume and reproduce share."""

import sys
import time
from collections.abc import Callable

from drumline.files import ForgivingOutput
from drumline.plan.advise import change_words, with_advice
from drumline.plan.model import Plan
from drumline.plan.resplit import with_smaller_per_device
from drumline.runs.folder import RunFolder
from drumline.runs.trackers import Trackers
from drumline.session.launch import render_alone
from drumline.session.planning import make_plan
from drumline.session.progress import Progress
from drumline.session.world import read_world
from drumline.supervise.outcome import Result
from drumline.supervise.supervisor import Surroundings, run_attempts
from drumline_launchers.base import Command

Render = Callable[[Plan, int, int | None], Command]
"""From a plan, an attempt's number and the step to stop after to what starts its ranks."""
Survive = Callable[[Plan], tuple[Plan | None, str]]


def train_here(
    folder: RunFolder,
    plan: Plan,
    cause: str,
    until: int | None = None,
    render: Render | None = None,
    survive: Survive = lambda plan: (plan, ""),
) -> tuple[Result, float]:
    """Run the attempts; how it ended, and the seconds that it took.

    `render`: by default all ranks are on this machine. `survive`: of Surroundings.
    """
    sys.stderr = ForgivingOutput(sys.stderr.fileno())
    print(f"\nrun folder {folder.path}", file=sys.stderr)
    started = time.monotonic()
    progress = Progress(until or plan.steps.total)

    def alone(current: Plan, number: int, until: int | None) -> Command:
        return render_alone(current, folder, number, until=until)

    def tick(current: RunFolder) -> None:
        progress(current)
        trackers.look()

    around = Surroundings(
        render=lambda current, number: (render or alone)(current, number, until),
        shrink=_smaller_plan,
        advice=_advice_words,
        tick=tick,
        say=progress.say,
        is_automatic=render is not None,
        survive=survive,
    )
    try:
        with folder.locked(), Trackers(folder, plan.recipe, progress.say) as trackers:
            result = run_attempts(folder, plan, cause, around)
    finally:
        progress.close()
    return result, time.monotonic() - started


def _smaller_plan(plan: Plan) -> Plan | None:
    """What runs after an attempt that ran out of memory."""
    smaller = with_smaller_per_device(plan.recipe, plan.batch.split)
    return make_plan(smaller) if smaller else None


def _advice_words(plan: Plan) -> str:
    """What could make a plan fit that ran out of memory at per_device 1."""
    changes = with_advice(plan, read_world(plan.recipe)).advice
    head = "batch.per_device is 1 already, so a smaller micro-batch is no way out. Nearest:"
    lines = [f"  {change_words(item.change)}   {item.why}" for item in changes]
    return "\n".join([head, *lines]) if lines else f"{head} a GPU with more memory"
