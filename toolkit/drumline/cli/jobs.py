"""`drumline status | logs | cancel RUN`: the same for runs on this machine and on a cluster."""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from drumline.cli.options import AsJson, RunFolderArgument
from drumline.cluster.jobs import cancel_job, job_state
from drumline.cluster.slurm import JobState
from drumline.errors import RunFolderError
from drumline.files import open_regular, read_bytes
from drumline.metrics_file import last_step_line
from drumline.output import printable
from drumline.runs.folder import RunFolder, open_run
from drumline.runs.health import state_of
from drumline.runs.sweeps import is_sweep, runs_of_sweep

_FOLLOW_S = 0.5
_ASK_S = 5.0
"""Interval between queries of the scheduler, which many users may query at once."""
_LAST_BYTES = 4000
_MOST_BYTES = 1 << 24
_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING")


def status_command(run: RunFolderArgument, as_json: AsJson = False) -> None:
    """Show a run's state, step and loss, and what the scheduler says about its jobs.

    Example: drumline status runs/mine-1
    """
    if is_sweep(run):
        return _tell_sweep(run, as_json)
    facts, attempts = _facts(open_run(run))
    if as_json:
        print(json.dumps(facts))
        return
    loss = "" if facts["loss"] is None else f", loss {facts['loss']:.4f}"
    print(f"{facts['state']}  step {facts['step']:,}/{facts['total']:,}{loss}")
    for attempt in attempts:
        split = " × ".join(str(n) for n in attempt["split"].values())
        how = f"{printable(attempt['cause'])}; {attempt['outcome'] or 'goes on'}"
        print(f"attempt {attempt['number']}  {split}  {how}")
    for job in facts["jobs"]:
        print(_job_line(job))


def _job_line(job: dict[str, Any]) -> str:
    """A job as Slurm or Kubernetes sees it, then what its script has noted."""
    why = f" ({job['reason']})" if job["reason"] not in ("", "None") else ""
    note = f"  {printable(job['note'])}" if job["note"] else ""
    return f"job {job['id']}  {job['state']}{why}  {job['nodes']}  (by {job['source']}){note}"


def _tell_sweep(path: Path, as_json: bool) -> None:
    """Print one line for each run of a sweep."""
    found = [_facts(open_run(folder))[0] for folder in runs_of_sweep(path)]
    if as_json:
        print(json.dumps({"sweep": str(path), "runs": found}))
        return
    for facts in found:
        loss = "" if facts["loss"] is None else f", loss {facts['loss']:.4f}"
        jobs = "; ".join(_job_line(job) for job in facts["jobs"][-1:])
        step = f"step {facts['step']:,}/{facts['total']:,}{loss}"
        print(f"{Path(facts['run']).name}  {facts['state']}  {step}  {jobs}")


def _facts(folder: RunFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `status --json` prints of a run, and its attempts."""
    record = folder.read_record()
    attempts = record["attempts"]
    line = last_step_line(folder.metrics_file) or {}
    jobs = [_job_facts(folder, entry) for entry in record.get("jobs") or []]
    facts = {
        "run": str(folder.path),
        "state": _state(folder, attempts, jobs),
        "step": line.get("step", 0),
        "total": record["plan"]["steps"]["total"],
        "loss": line.get("loss"),
        "attempts": len(attempts),
        "restarts": record["restarts"],
        "last": _shown(attempts[-1]) if attempts else None,
        "jobs": jobs,
    }
    return facts, attempts


def logs_command(
    run: RunFolderArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run ends.")] = False,
    rank: Annotated[int, typer.Option("--rank", min=0, help="The rank whose log to print.")] = 0,
) -> None:
    """Print the job's log (without a job: the metrics), and the newest attempt's launcher and rank log.

    Example: drumline logs runs/mine-1
    """
    if is_sweep(run):
        for path in runs_of_sweep(run):
            for text in _new_texts(open_run(path), rank, {}):
                print(text, end="")
        return
    folder = open_run(run)
    shown: dict[Path, int] = {}
    asked, is_over = float("-inf"), not follow
    while True:
        if follow and not folder.is_locked() and time.monotonic() - asked >= _ASK_S:
            asked, is_over = time.monotonic(), not _has_live_jobs(folder)
        for text in _new_texts(folder, rank, shown):
            print(text, end="", flush=True)
        if is_over:
            return
        time.sleep(_FOLLOW_S)


def cancel_command(
    run: RunFolderArgument,
    now: Annotated[bool, typer.Option("--now", help="Without saving.")] = False,
) -> None:
    """Stop a run: all ranks finish the step and save; waiting jobs are removed from the queue.

    A sweep: every run of it that waits or runs.

    Example: drumline cancel runs/mine-1
    """
    if is_sweep(run):
        stopped = [path for path in runs_of_sweep(run) if _cancel_if_live(path, now)]
        if not stopped:
            raise RunFolderError(
                f"{run}: nothing runs. Nearest: drumline status {shlex.quote(str(run))}"
            )
        return
    _cancel(run, now)


def _cancel_if_live(run: Path, now: bool) -> bool:
    try:
        _cancel(run, now)
    except RunFolderError:
        return False
    return True


def _cancel(run: Path, now: bool) -> None:
    folder = open_run(run)
    jobs = [(entry, job_state(entry)) for entry in folder.read_record().get("jobs") or []]
    live = [(entry, state) for entry, state in jobs if state is None or not state.is_final]
    supervisor = folder.supervisor()
    if supervisor and all(state is None for _, state in live):
        live = []  # the run is on this host; the scheduler no longer knows its jobs
    if not live and supervisor is None:
        raise RunFolderError(
            f"{run}: nothing runs. Nearest: drumline status {shlex.quote(str(run))}"
        )
    for entry, state in reversed(live):  # a chain's last job first, as it waits for the others
        gently = not now and state is not None and state.state == "RUNNING"
        (folder.path / "logs").mkdir(exist_ok=True)
        (
            folder.path / "logs" / f"cancelled-{entry['id'].replace('/', '-')}"
        ).touch()  # the job script then does not requeue
        cancel_job(entry, gently)
        print(f"job {entry['id']}: {'asked to save and stop' if gently else 'cancelled'}")
    if not live and supervisor:
        supervisor.send(signal.SIGTERM)
        if now:
            supervisor.send(signal.SIGINT)
            supervisor.send(signal.SIGINT)
        print("ended" if now else "asked to save and stop")


def _shown(attempt: dict[str, Any]) -> dict[str, Any]:
    return {key: attempt.get(key) for key in ("cause", "split", "outcome", "message")}


def _job_facts(folder: RunFolder, entry: dict[str, Any]) -> dict[str, Any]:
    """What the scheduler says about a job, and the last note of its script."""
    found = job_state(entry)
    if found is None:
        found = JobState(
            "unknown", "its scheduler lists it no more, or is out of reach from here", "", "none"
        )
    return {**entry, **dataclasses.asdict(found), "note": _note_of(folder, str(entry["id"]))}


def _note_of(folder: RunFolder, job: str) -> str:
    """What the job's script has written last: that it began, why its set-up failed, how it ended."""
    try:
        path = folder.path / "logs" / f"job-{job.replace('/', '-')}.state"
        return read_bytes(path, _LAST_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def _state(folder: RunFolder, attempts: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> str:
    """Return the run's own state, or the job's if one waits in the queue and nothing supervises the run."""
    has_ended = bool(attempts) and attempts[-1]["outcome"] == "finished"
    if folder.is_locked() or has_ended:
        return state_of(folder, attempts)
    live = [job["state"].lower() for job in jobs if job["state"] in _LIVE]
    if live:
        return "starting" if live[0] == "running" else str(live[0])
    if not attempts and jobs and jobs[-1]["state"] not in ("unknown", "COMPLETED"):
        return f"{jobs[-1]['state'].split()[0].lower()} before it began"
    return state_of(folder, attempts)


def _has_live_jobs(folder: RunFolder) -> bool:
    jobs = folder.read_record().get("jobs") or []
    return any((state := job_state(entry)) and not state.is_final for entry in jobs)


def _new_texts(folder: RunFolder, rank: int, shown: dict[Path, int]) -> Iterator[str]:
    """Yield what each log has gained since it was last shown; the first time, its last `_LAST_BYTES`."""
    found = folder.path.glob("logs/attempt-*")
    numbered = [path for path in found if path.name.removeprefix("attempt-").isdecimal()]
    attempts = sorted(numbered, key=lambda path: int(path.name.removeprefix("attempt-")))
    newest = [attempts[-1] / "launcher.log", attempts[-1] / f"rank-{rank}.log"] if attempts else []
    told = sorted(folder.path.glob("logs/job-*.log")) or [folder.metrics_file]
    for path in [*told, *newest]:
        with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = shown.get(path, max(0, size - _LAST_BYTES))
            file.seek(start)
            raw = file.read(_MOST_BYTES)
            if not raw:
                continue
            if path not in shown and len(shown) + len(newest) > 0:
                yield f"==> {path.relative_to(folder.path)} <==\n"
            shown[path] = start + len(raw)
            text = raw.decode(errors="replace")
            yield printable(text)
    sys.stdout.flush()


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("status")(status_command)
    app.command("logs")(logs_command)
    app.command("cancel")(cancel_command)
