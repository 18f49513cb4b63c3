"""Several nodes without srun: the first supervises the run, the others follow it through the run folder.

For each attempt the first node writes the rendezvous into the attempt's log folder. The others then start
their launcher, and kill it if it is still there some time after the attempt has ended.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from drumline.errors import RunFolderError
from drumline.files import write_json, write_text
from drumline.plan.model import Plan
from drumline.processes import free_port, python_path
from drumline.recipe.load import load_recipe
from drumline.runs.code import CODE
from drumline.runs.folder import RunFolder
from drumline.runs.freeze import CODE_TEXT, thaw
from drumline.runs.record import new_record
from drumline.secrets import Secrets
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline_launchers import LAUNCHERS
from drumline_launchers.base import Command, Job
from drumline_launchers.environment import launch_environment

_POLL_S = 0.5
_GRACE_S = 15.0
_FRESH_S = 60.0
"""Seconds in which a follower without an attempt ignores an end file, which may be an earlier start's."""
_RENDEZVOUS = "rendezvous.json"
_OVER = "attend-over.json"


def adopt(source: Path, folder: RunFolder) -> None:
    """Create the run folder from the files in `source` (at least recipe.yaml), unless it exists.

    RunFolderError if the folder belongs to another training.
    """
    if not (source / "recipe.yaml").is_file():
        raise RunFolderError(f"--from {source}: it holds no recipe.yaml")
    if folder.record_file.is_file():
        ours = _training_of(source)
        if ours != (theirs := folder.read_record()["training_sha256"]):
            raise RunFolderError(
                f"{folder.path}: another run has this folder (training_sha256 {theirs}, not {ours}). "
                "Nearest: submit with another --run-dir, whose name is the run's"
            )
        return
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.yaml")):
        shutil.copyfile(path, folder.path / path.name)
    code = source / CODE_TEXT
    if code.is_file():
        thaw(code.read_text(encoding="utf-8"), folder.path / CODE)
    record = source / "record.json"
    if record.is_file():
        write_text(folder.record_file, record.read_text(encoding="utf-8"))
        return
    recipe = load_recipe(str(source / "recipe.yaml"))
    prepare_data(recipe)
    plan = make_plan(recipe)
    folder.write_recipe(plan.recipe.model_dump(by_alias=True))
    folder.write_record(new_record(plan, sys.argv, Secrets(os.environ)))


def _training_of(source: Path) -> str:
    record = source / "record.json"
    if record.is_file():
        return str(json.loads(record.read_text(encoding="utf-8"))["training_sha256"])
    recipe = load_recipe(str(source / "recipe.yaml"))
    prepare_data(recipe)
    return make_plan(recipe).training_sha256


def render_first(plan: Plan, number: int, folder: RunFolder, until: int | None) -> Command:
    """Write the attempt's rendezvous for the other nodes, and render the first node's launcher."""
    host = os.environ.get("POD_IP") or socket.gethostbyname(socket.gethostname())
    port = free_port()
    write_json(folder.logs(number) / _RENDEZVOUS, {"host": host, "port": port, "until": until})
    command = _launcher(plan, number, folder, 0, {"host": host, "port": port, "until": until})
    return Command(command.argv, command.env, command.files, is_remote=plan.batch.nodes > 1)


def begin(folder: RunFolder) -> None:
    """Delete the end file of an earlier start; the first node calls this when it starts."""
    (folder.path / _OVER).unlink(missing_ok=True)


def end(folder: RunFolder, exit_code: int) -> None:
    """Write the end file, which makes the other nodes exit with this code."""
    write_json(folder.path / _OVER, {"exit_code": exit_code})


def follow(folder: RunFolder, node: int) -> int:
    """Start a launcher for each attempt, on a node other than the first; return the exit code of the run."""
    began, done = time.monotonic(), -1
    while True:
        over = _object(folder.path / _OVER)
        if over and (done >= 0 or time.monotonic() - began > _FRESH_S):
            return int(over["exit_code"])
        newest = _newest_attempt(folder)
        if newest is not None and newest > done:
            done = newest
            _take_part(folder, newest, node)
        time.sleep(_POLL_S)


def _take_part(folder: RunFolder, number: int, node: int) -> None:
    """Run this node's launcher until it exits; kill it `_GRACE_S` after the attempt has ended."""
    plan = folder.read_plan(number)
    if node >= plan.batch.nodes:
        print(f"attempt {number} does not use node {node}", flush=True)
        return
    rendezvous = _object(folder.logs(number) / _RENDEZVOUS)
    assert rendezvous
    command = _launcher(plan, number, folder, node, rendezvous)
    command.write_files()
    ours = {"PYTHONPATH": python_path(os.environ), "DRUMLINE_SUPERVISOR": _supervisor(folder)}
    env = launch_environment(os.environ, {**command.env, **ours})
    process = subprocess.Popen(
        command.argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True
    )
    ended = None
    while process.poll() is None:
        if (folder.logs(number) / "ended").exists():
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _GRACE_S:
                process.kill()
        time.sleep(_POLL_S)


def _launcher(
    plan: Plan, number: int, folder: RunFolder, node: int, rendezvous: dict[str, Any]
) -> Command:
    job = Job(
        plan_file=folder.plan_file(number),
        run_folder=folder.path,
        attempt=number,
        python=sys.executable,
        node_rank=node,
        host=rendezvous["host"],
        port=rendezvous["port"],
        until=rendezvous["until"],
        address=os.environ.get("POD_IP"),
    )
    return LAUNCHERS[plan.recipe.launch.launcher](plan, job)


def _newest_attempt(folder: RunFolder) -> int | None:
    """Return the newest attempt that has a rendezvous and has not ended."""
    found = [
        int(path.parent.name.rpartition("-")[2])
        for path in folder.path.glob(f"logs/attempt-*/{_RENDEZVOUS}")
        if not (path.parent / "ended").exists()
    ]
    return max(found, default=None)


def _supervisor(folder: RunFolder) -> str:
    try:
        return folder.lock_text()
    except OSError:
        return ""


def _object(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None
