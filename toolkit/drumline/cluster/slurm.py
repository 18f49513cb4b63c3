"""Slurm's commands to submit, query, shrink and cancel jobs; the only place that parses their output."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drumline.errors import LaunchError

OUR_COMMENT = "the run folder is not visible"
"""Prefix of the job comment that our batch script sets; other comments are the site's."""
_SLURM_S = 60.0
_HINTS = {
    "invalid partition": "sinfo lists the partitions",
    "Unable to contact slurm controller": "the controller is down, or SLURM_CONF names another one",
    "Socket timed out": "the controller does not answer; was the job submitted after all? squeue --me tells",
    "Invalid account": "sacctmgr show associations lists your accounts",
    "Requested node configuration is not available": "sinfo -N -o '%N %c %m %G' lists what nodes have",
    "Node count specification invalid": "the partition has fewer nodes than cluster.nodes asks for",
    "Invalid qos": "sacctmgr show qos lists them",
}
_REASONS = {
    "JobLaunchFailure": "JobLaunchFailure: is the run folder visible on the node?",
    "JobHeldUser": "JobHeldUser: held; scontrol release lets it start",
}
"""Slurm's reasons that need a word of explanation."""
_FINAL = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
          "PREEMPTED", "TIMEOUT")  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """A job's state; `source` is the command that reported it, `reason` Slurm's or our script's comment."""

    state: str
    reason: str
    nodes: str
    source: str

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.state.startswith(_FINAL)


def submit(script: Path, hold: bool = False) -> str:
    """Submit a batch script and return the job id; LaunchError with sbatch's message and the nearest fix.

    Variables named SBATCH_… would replace options of the script, so those that the script states are left
    out of sbatch's environment.
    """
    done = _run(
        "sbatch",
        "--parsable",
        *(["--hold"] if hold else []),
        str(script),
        without=_replacing(script.read_text(encoding="utf-8")),
    )
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or not job.isdigit():
        raise LaunchError(f"sbatch: {_words(done)}")
    return job


_MAY_COME_FROM_OUTSIDE = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
                          "SBATCH_RESERVATION": "reservation", "SBATCH_TIMELIMIT": "time"}  # fmt: skip
"""A site's defaults, used where the script states none."""


def _replacing(script: str) -> list[str]:
    """Names of this environment's SBATCH_… variables that would change the script's options."""
    stated = set(re.findall(r"^#SBATCH --([a-z-]+)", script, flags=re.MULTILINE))
    return [
        name
        for name in os.environ
        if name.startswith("SBATCH_")
        and (name not in _MAY_COME_FROM_OUTSIDE or _MAY_COME_FROM_OUTSIDE[name] in stated)
    ]


def job_state(job: str) -> JobState | None:
    """State of a job from scontrol, else sacct, else sacct's job completion log; None if none knows it."""
    for ask in (_from_scontrol, _from_sacct, _from_completions):
        found = ask(job)
        if found:
            return found
    return None


def host_names(node_list: str) -> list[str]:
    """Expand Slurm's `node[1-3,7]` to host names; LaunchError if scontrol fails."""
    done = _run("scontrol", "show", "hostnames", node_list)
    if done.returncode or not done.stdout.split():
        raise LaunchError(f"scontrol show hostnames {node_list}: {_words(done)}")
    return done.stdout.split()


def partitions() -> dict[str, dict[str, str]]:
    """Every partition's fields by its name, as scontrol shows them; {} if Slurm does not answer."""
    done = _run("scontrol", "show", "partition", "--oneliner")
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def node_lines(partition: str) -> list[str]:
    """One line `cores|memory in MiB|gres` for each node of a partition that is not down."""
    done = _run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%c|%m|%G")
    return done.stdout.splitlines() if done.returncode == 0 else []


def associations(user: str) -> list[tuple[str, str]]:
    """Account and list of QOS of each association of a user; [] where accounting is off."""
    done = _run("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}",
                "format=account,qos")  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1]
    return [(row[0], row[1]) for row in rows] if done.returncode == 0 else []


def answering(hosts: list[str], command: list[str]) -> list[str]:
    """Hosts whose names the command prints, in the given order; all hosts if it prints none of them."""
    answers = set(_run(*command).stdout.split())
    return [host for host in hosts if host in answers] or hosts


def keep_only(job: str, hosts: list[str]) -> str:
    """Release the job's other nodes, so that a dead one does not end it; returns Slurm's error or "".

    Slurm may requeue the job at the same moment, for the node that it lost. For a waiting job the same
    command would require these nodes at the next start, so that requirement is taken back.
    """
    if _is_waiting(job):
        return "Slurm has requeued the job meanwhile"
    with tempfile.TemporaryDirectory() as where:  # scontrol writes two scripts to its cwd
        change = ["update", f"JobId={job}", f"NodeList={','.join(hosts)}"]
        done = _run("scontrol", *change, where=Path(where))
    if _is_waiting(job):
        _run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    return _words(done) if done.returncode else ""


def _is_waiting(job: str) -> bool:
    found = _from_scontrol(job)
    return found is not None and found.state == "PENDING"


def cancel(job: str, gently: bool) -> None:
    """Cancel the job; `gently` sends SIGTERM to its script, so that all ranks save first."""
    arguments = ["--signal=TERM", "--batch"] if gently else []
    done = _run("scancel", *arguments, "--", job)
    if done.returncode:
        raise LaunchError(f"scancel: {_words(done)}")


def _from_scontrol(job: str) -> JobState | None:
    done = _run("scontrol", "show", "job", "--oneliner", job)
    if done.returncode:
        return None
    fields = dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", done.stdout.splitlines()[0]))
    comment = fields.get("Comment", "").strip()
    reason = str(fields.get("Reason", ""))
    return JobState(
        fields.get("JobState", "?"),
        comment if comment.startswith(OUR_COMMENT) else _REASONS.get(reason, reason),
        fields.get("NodeList", ""),
        "scontrol",
    )


def _from_sacct(job: str) -> JobState | None:
    fields = "State,Reason,NodeList"
    done = _run(
        "sacct", "--noheader", "--parsable2", "--allocations", f"--format={fields}", "--jobs", job
    )
    return _first_row(done, "sacct")


def _from_completions(job: str) -> JobState | None:
    done = _run(
        "sacct",
        "--completion",
        "--noheader",
        "--parsable2",
        "--format=State,NodeList",
        "--jobs",
        job,
    )
    row = done.stdout.strip().splitlines()
    if done.returncode or not row or "|" not in row[-1]:
        return None
    state, nodes = row[-1].split("|")[:2]
    return JobState(state, "", nodes, "sacct --completion")


def _first_row(done: subprocess.CompletedProcess[str], source: str) -> JobState | None:
    rows = done.stdout.strip().splitlines()
    if done.returncode or not rows or rows[0].count("|") != 2:
        return None
    state, reason, nodes = rows[0].split("|")
    return JobState(state, reason, nodes, source)


def _run(
    *command: str, where: Path | None = None, without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a missing command or a timeout counts as a failure."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SLURM_S,
            check=False,
            cwd=where,
            env={k: v for k, v in {**os.environ, "LC_ALL": "C"}.items() if k not in without},
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: not found")
    except subprocess.TimeoutExpired as late:
        words = f"{command[0]} did not answer within {_SLURM_S:.0f} s"
        said = (late.stdout or b"").decode(errors="replace")  # bytes, even with text=True
        return subprocess.CompletedProcess(command, 124, said, words)


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """The command's error message, with a hint on what to do."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [
        "it printed no error"
    ]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    text = errors[-1] if errors else lines[0].partition(": ")[2] or lines[0]
    hint = next(
        (hint for words, hint in _HINTS.items() if words.lower() in done.stderr.lower()), ""
    )
    return f"{text}. Nearest: {hint}" if hint else text
