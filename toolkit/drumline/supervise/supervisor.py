"""Starts attempts until the run is finished, stopped, cannot succeed, or makes no progress."""

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from drumline.checkpoint.beginning import why_not_anew
from drumline.checkpoint.manifest import step_of
from drumline.checkpoint.retention import find_checkpoints, set_aside
from drumline.errors import CheckpointError, RunFolderError
from drumline.metrics_file import last_step_line
from drumline.plan.model import Plan
from drumline.processes import age_s
from drumline.rank_files import RankFiles
from drumline.runs.changes import change_words, changed_since
from drumline.runs.closing import close_run
from drumline.runs.folder import RunFolder
from drumline.runs.peaks import memory_entry
from drumline.runs.record import attempt_entry, now
from drumline.runs.step_times import time_entry
from drumline.secrets import Secrets
from drumline.supervise.after import AfterWork
from drumline.supervise.attempt import Tick, end_ranks, run_attempt
from drumline.supervise.outcome import LOG_ENDS, STOPPED_EXIT_CODE, Result
from drumline.supervise.ranks import Ranks
from drumline.supervise.signals import Signals
from drumline_launchers.base import Command
from drumline_launchers.environment import cleared_names, kept_variables

_FINAL = ("finished", "stopped", "killed", "mistake", "disk", "NotFinite", "CheckpointError")


@dataclass(frozen=True)
class Surroundings:
    """Functions that the supervisor calls to start an attempt, to change the plan, and to report.

    `render` returns the launcher's command for an attempt; `tick` shows progress; `say` prints one line.
    `shrink` returns the plan with the next smaller per_device, or None; `advice` describes what to change
    when a plan ran out of memory and `shrink` returned None.
    `is_automatic`: started by a scheduler, so starting after a lost attempt counts as a restart.
    `survive`, called before a restart, returns the plan for the remaining nodes (possibly unchanged) and a
    description of lost nodes; the plan is None if the job must be requeued on other nodes.
    """

    render: Callable[[Plan, int], Command]
    shrink: Callable[[Plan], Plan | None]
    advice: Callable[[Plan], str]
    tick: Tick
    say: Callable[[str], None]
    is_automatic: bool = False
    survive: Callable[[Plan], tuple[Plan | None, str]] = lambda plan: (plan, "")


def run_attempts(folder: RunFolder, plan: Plan, cause: str, around: Surroundings) -> Result:
    """Start attempts as long as a restart can help; returns how the run ended."""
    lost_at = close_lost_attempt(folder)
    _refuse_to_begin_anew(folder, around.is_automatic)
    _tell_missing_lines(folder, around.say)
    if around.is_automatic and lost_at is not None:
        over = _hopeless(folder, plan, lost_at)
        if over:
            return over
    with Signals() as signals:
        after = AfterWork(folder, plan, around.say)
        try:
            beside = replace(around, tick=_both(around.tick, after))
            result = _until_final(folder, plan, cause, beside, signals, lost_at)
            if result.outcome == "finished" and not after.finish(signals, result.step):
                return replace(
                    result.saying(
                        "commands that checkpoints are owed were stopped; resume runs them"
                    ),
                    outcome="stopped",
                    exit_code=STOPPED_EXIT_CODE,
                )
        finally:
            after.stop()
    if result.outcome == "finished":
        close_run(folder, around.say)
    return result


def _both(tick: Tick, after: AfterWork) -> Tick:
    """Show progress, and start the commands that new checkpoints are owed."""

    def both(folder: RunFolder) -> None:
        tick(folder)
        after.tick()

    return both


def _refuse_to_begin_anew(folder: RunFolder, is_automatic: bool) -> None:
    """Raise CheckpointError if this start would give up steps that were trained before.

    A scheduler may start a run again that was lost before its first save; a person has to say it
    (`--from-scratch`).
    """
    why = why_not_anew(folder.checkpoints, folder.metrics_file)
    if not why and not is_automatic and not find_checkpoints(folder.checkpoints):
        reached = folder.steps_reached()
        if reached:
            why = f"{folder.path}: it reached step {reached:,} and saved no checkpoint. Nearest: another run"
    if why:
        raise CheckpointError(
            f"{why}; or begin again at step 1: drumline resume --from-scratch "
            f"{shlex.quote(str(folder.path))}, which keeps the old metrics beside the new"
        )


def _tell_missing_lines(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Say that metrics.jsonl ends before the checkpoint, from which the run goes on all the same."""
    if os.path.lexists(folder.metrics_file) and not folder.metrics_file.is_file():
        raise RunFolderError(f"{folder.metrics_file}: is not a regular file. Nearest: move it away")
    saved = _newest_step(folder)
    last = (last_step_line(folder.metrics_file) or {"step": 0})["step"]
    if last < saved:
        say(
            f"{folder.metrics_file}: it ends at step {last:,}, the newest checkpoint is of step {saved:,}; "
            "the steps between stay without a line"
        )


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
    before: dict[str, float] = {"plan": round(age_s(), 3)}
    while True:
        result = _one_attempt(folder, plan, cause, is_restart, around, signals, before)
        before = {}
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
            failed_at, why = result.step, _short(result.message)
            if result.suspect:
                why += _set_aside_since(folder, result.suspect)
            left, words = around.survive(plan)
            if words:
                why = f"{words}; {why}"
            if left is None:  # the requeued job counts as this restart
                folder.note(restarts=starts)
                return replace(result.saying(why), exit_code=STOPPED_EXIT_CODE)
            plan, cause = left, f"restart: {why}"
        around.say(cause)


def _short(message: str) -> str:
    """The message without the launcher's log, which the attempt's own message keeps."""
    return message.partition(LOG_ENDS)[0]


def _one_attempt(
    folder: RunFolder,
    plan: Plan,
    cause: str,
    is_restart: bool,
    around: Surroundings,
    signals: Signals,
    before: dict[str, float],
) -> Result:
    """Run one attempt and write its entry in the record; an OSError becomes a result of kind "disk".

    `before`: seconds of the phases before this attempt, which belong to its start.
    """
    try:
        changed = changed_since(folder.read_record(), plan.recipe)
        if changed:
            around.say(f"changed since the run was recorded: {change_words(changed)}")
        kept = Secrets(os.environ).hide_in(kept_variables(os.environ))
        entry = attempt_entry(plan, cause, kept, cleared_names(os.environ), changed)
        number = folder.add_attempt(plan, entry, is_restart)
    except OSError as error:
        where = error.filename or folder.path
        return Result.failure("disk", 0, f"{where}: {error.strerror or error}")
    launched = time.time()
    try:
        command = around.render(plan, number)
        folder.note_attempt(number, command=command.argv)
        result = run_attempt(folder, plan, number, command, around.tick, around.say, signals)
    except OSError as error:
        where = error.filename or folder.path
        result = Result.failure("disk", 0, f"{where}: {error.strerror or error}")
    if result.outcome == "failed" or result.step == 0:
        result = replace(result, step=max(result.step, _newest_step(folder)))
    ranks = Ranks(folder.logs(number), plan.mesh.ranks).files
    begun = ranks[0].begun() or {}
    started = _start_seconds(ranks[0], launched, before)
    try:
        folder.note_attempt(
            number,
            ended=now(),
            outcome=result.outcome,
            kind=result.kind,
            step=result.step,
            message=result.message,
            memory=memory_entry(plan, ranks),
            time=time_entry(plan, folder, int(begun.get("from_step", plan.first_step - 1))),
            devices=_devices(ranks),
            start_s=started,
            **begun,
        )
    except OSError as error:
        around.say(f"{folder.record_file}: {error.strerror}; it lacks how this attempt ended")
    return result


def _start_seconds(
    rank: RankFiles, launched: float, before: dict[str, float]
) -> dict[str, float] | None:
    """Seconds from the command's start to the first step, by phase; None if there was no first step.

    `launched`: when the attempt began, in seconds since 1970. `launch` is the launcher and Python, until the
    rank began to report.
    """
    phases = rank.started()
    began = rank.announced_at()
    if phases is None or began is None:
        return None
    return {**before, "launch": round(max(0.0, began - launched), 3), **phases}


def close_lost_attempt(folder: RunFolder) -> int | None:
    """If the last attempt's supervisor was killed, kill its ranks and complete its entry in the record.

    To call with the run locked, before its checkpoints are looked at: ranks that have not noticed yet still
    train and save. Returns the step that the attempt reached; None if no attempt was lost.
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
    """Fail if a requeued job made no progress or used up its restarts, as `_until_final` does; else None."""
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
    """Distinct device descriptions of the ranks."""
    found: list[dict[str, Any]] = []
    for facts in (files.device() for files in ranks):
        if facts and facts not in found:
            found.append(facts)
    return found


def _newest_step(folder: RunFolder) -> int:
    """Step of the newest checkpoint: a lower bound of the progress even if an attempt fails while loading."""
    saved = find_checkpoints(folder.checkpoints)
    return (step_of(saved[-1]) or 0) if saved else 0


def _set_aside_since(folder: RunFolder, suspect: str) -> str:
    """Set aside the suspect checkpoint and all newer ones; returns a description."""
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
