"""Attempt after attempt, until the run is finished, stopped, wrong, or makes no progress."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from drumline.checkpoint.manifest import step_of
from drumline.checkpoint.retention import find_checkpoints, set_aside
from drumline.plan.model import Plan
from drumline.rank_files import RankFiles
from drumline.runs.closing import close_run
from drumline.runs.folder import RunFolder
from drumline.runs.peaks import memory_entry
from drumline.runs.record import attempt_entry, now
from drumline.supervise.attempt import Tick, end_ranks, run_attempt
from drumline.supervise.outcome import STOPPED_EXIT_CODE, Result
from drumline.supervise.ranks import Ranks
from drumline.supervise.signals import Signals
from drumline_launchers.base import Command

_FINAL = ("finished", "stopped", "killed", "mistake", "disk", "NotFinite", "CheckpointError")


@dataclass(frozen=True)
class Surroundings:
    """What the supervisor is given: how to start an attempt, how to plan a smaller one, who watches.

    `shrink` gives the plan with the next smaller per_device, or None; `advice` words for a plan
    that has run out of memory and cannot be split further; `say` tells the person one line.
    `is_automatic`: a scheduler starts this, not a person, so that a start after a loss is a restart.
    `survive`, before a restart: the plan for the nodes that are left, which may be the same, and words if it
    is not; no plan where the scheduler must give others.
    """

    render: Callable[[Plan, int], Command]
    shrink: Callable[[Plan], Plan | None]
    advice: Callable[[Plan], str]
    tick: Tick
    say: Callable[[str], None]
    is_automatic: bool = False
    survive: Callable[[Plan], tuple[Plan | None, str]] = lambda plan: (plan, "")


def run_attempts(folder: RunFolder, plan: Plan, cause: str, around: Surroundings) -> Result:
    """Start, and start again as long as that can help; the truth about how the run ended."""
    lost_at = _close_lost_attempt(folder)
    if around.is_automatic and lost_at is not None:
        over = _hopeless(folder, plan, lost_at)
        if over:
            return over
    with Signals() as signals:
        result = _until_final(folder, plan, cause, around, signals, lost_at)
    if result.outcome == "finished":
        close_run(folder, around.say)
    return result


def _until_final(
    folder: RunFolder,
    plan: Plan,
    cause: str,
    around: Surroundings,
    signals: Signals,
    lost_at: int | None,
) -> Result:
    is_restart = around.is_automatic and lost_at is not None
    failed_at = lost_at if is_restart and lost_at is not None else -1
    while True:
        result = _one_attempt(folder, plan, cause, is_restart, around, signals)
        is_restart = result.kind != "OutOfMemory"
        if result.kind in _FINAL:
            return result
        if signals.first:
            return result.saying(f"failed while stopping on a signal: {result.message}")
        if not is_restart:
            smaller = around.shrink(plan)
            if smaller is None:
                return result.saying(f"{result.message}\n{around.advice(plan)}")
            cause = _resplit_words(plan, smaller, result)
            plan = smaller
        else:
            if result.step == failed_at:
                return result.saying(f"no progress since step {failed_at}: {result.message}")
            starts = 1 + folder.read_record()["restarts"]
            if starts > plan.recipe.launch.max_restarts:
                return result.saying(f"gave up after {starts} failed starts: {result.message}")
            failed_at, why = result.step, result.message
            if result.suspect:
                why += _set_aside_since(folder, result.suspect)
            left, words = around.survive(plan)
            if words:
                why = f"{words}; {why}"
            if left is None:  # the scheduler's new start is this restart
                folder.note(restarts=starts)
                return replace(result.saying(why), exit_code=STOPPED_EXIT_CODE)
            plan, cause = left, f"restart: {why}"
        around.say(cause)


def _one_attempt(
    folder: RunFolder,
    plan: Plan,
    cause: str,
    is_restart: bool,
    around: Surroundings,
    signals: Signals,
) -> Result:
    """One attempt, with its entry in the record; a full disk does not hide how it ended."""
    try:
        number = folder.add_attempt(plan, attempt_entry(plan, cause), is_restart)
    except OSError as error:
        where = error.filename or folder.path
        return Result.failure("disk", 0, f"{where}: {error.strerror or error}")
    try:
        command = around.render(plan, number)
        folder.note_attempt(number, command=command.argv)
        result = run_attempt(folder, plan, number, command, around.tick, around.say, signals)
    except OSError as error:
        where = error.filename or folder.path
        result = Result.failure("disk", 0, f"{where}: {error.strerror or error}")
    if result.outcome == "failed":
        result = replace(result, step=max(result.step, _newest_step(folder)))
    ranks = Ranks(folder.logs(number), plan.mesh.ranks).files
    begun = ranks[0].begun() or {}
    try:
        folder.note_attempt(
            number,
            ended=now(),
            outcome=result.outcome,
            kind=result.kind,
            step=result.step,
            message=result.message,
            memory=memory_entry(plan, ranks),
            devices=_devices(ranks),
            **begun,
        )
    except OSError as error:
        around.say(f"{folder.record_file}: {error.strerror}; it lacks how this attempt ended")
    return result


def _close_lost_attempt(folder: RunFolder) -> int | None:
    """An attempt whose supervisor was killed: its ranks are ended, its entry says what is known.

    The step that it came to; None where none was lost.
    """
    attempts = folder.read_record()["attempts"]
    if not attempts or attempts[-1]["ended"] is not None:
        return None
    last = attempts[-1]
    logs = folder.logs(last["number"])
    ranks = Ranks(logs, last["split"]["gpus"])
    if logs.is_dir():
        end_ranks(ranks)
    ranks.refresh()
    step = max(ranks.steps_done, _newest_step(folder))
    folder.note_attempt(
        last["number"],
        ended=now(),
        outcome="failed",
        kind="lost",
        step=step,
        message="the supervisor was killed",
        devices=_devices(ranks.files),
    )
    return step


def _hopeless(folder: RunFolder, plan: Plan, lost_at: int) -> Result | None:
    """Why a scheduler's new start after a lost attempt is not worth it, by the same two rules."""
    record = folder.read_record()
    before = [a for a in record["attempts"][:-1] if a["outcome"] == "failed"][-1:]
    message = record["attempts"][-1]["message"]
    if before and before[0].get("step") == lost_at and before[0] is record["attempts"][-2]:
        message = f"no progress since step {lost_at}: {message}"
    elif record["restarts"] >= plan.recipe.launch.max_restarts:
        message = f"gave up after {1 + record['restarts']} failed starts: {message}"
    else:
        return None
    return Result.failure("lost", lost_at, message)


def _devices(ranks: list[RankFiles]) -> list[dict[str, Any]]:
    """What the ranks trained on, each kind once."""
    found: list[dict[str, Any]] = []
    for facts in (files.device() for files in ranks):
        if facts and facts not in found:
            found.append(facts)
    return found


def _newest_step(folder: RunFolder) -> int:
    """An attempt that fails while it loads has not lost the steps that are saved."""
    saved = find_checkpoints(folder.checkpoints)
    return (step_of(saved[-1]) or 0) if saved else 0


def _set_aside_since(folder: RunFolder, suspect: str) -> str:
    """Set aside the checkpoint after which nothing was finite, and those saved since; the words."""
    names = [
        set_aside(path).name
        for path in find_checkpoints(folder.checkpoints)
        if path.name >= suspect
    ]
    return f"; kept as {', '.join(names)}, falling back to the checkpoint before"


def _resplit_words(before: Plan, after: Plan, result: Result) -> str:
    return (
        f"out of memory: {result.message.splitlines()[0]}; "
        f"{before.batch.split} becomes {after.batch.split}, the same effective batch"
    )
