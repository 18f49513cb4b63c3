"""Runs attempts from this machine, with progress on stderr, for run, resume, reproduce and attend."""

import sys
import time
from collections.abc import Callable

from drumline.plan.advise import change_words, with_advice
from drumline.plan.model import Plan
from drumline.plan.resplit import with_smaller_per_device
from drumline.runs.folder import RunFolder
from drumline.runs.trackers import Trackers
from drumline.session.launch import render_alone
from drumline.session.planning import make_plan, world_of
from drumline.session.progress import Progress
from drumline.supervise.outcome import Result
from drumline.supervise.supervisor import Surroundings, run_attempts
from drumline_launchers.base import Command

Render = Callable[[Plan, int, int | None], Command]
"""Maps a plan, an attempt's number and the step to stop after to the command that starts the ranks."""
Survive = Callable[[Plan], tuple[Plan | None, str]]


def train_here(
    folder: RunFolder,
    plan: Plan,
    cause: str,
    until: int | None = None,
    render: Render | None = None,
    survive: Survive = lambda plan: (plan, ""),
) -> tuple[Result, float]:
    """Run the attempts; return how the run ended and how many seconds it took.

    `until`: the step to stop after. `render`: by default all ranks are on this machine. `survive`: see
    Surroundings.
    """
    print(f"\nrun folder {folder.path}", file=sys.stderr)
    started = time.monotonic()
    planned = plan.time.samples_per_s if plan.time else None
    progress = Progress(until or plan.steps.total, planned)

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
    """Return the plan to try after running out of memory, or None: a smaller per_device, same batch."""
    smaller = with_smaller_per_device(plan.recipe, plan.batch.split)
    return make_plan(smaller, start=plan.start) if smaller else None


def _advice_words(plan: Plan) -> str:
    """Say what could make the plan fit, after it ran out of memory at per_device 1."""
    changes = with_advice(plan, world_of(plan)).advice
    head = "batch.per_device is 1 already and cannot be made smaller. Nearest:"
    lines = [f"  {change_words(item.change)}   {item.why}" for item in changes]
    return "\n".join([head, *lines]) if lines else f"{head} a GPU with more memory"
