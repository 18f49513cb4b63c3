"""State and cancellation of a run's jobs, on Slurm or Kubernetes."""

import json
import subprocess
from typing import Any

from drumline.cluster import slurm
from drumline.cluster.slurm import JobState
from drumline.errors import LaunchError

_KUBECTL_S = 60.0
_FINAL_CONDITIONS = {"Complete": "COMPLETED", "Completed": "COMPLETED", "Failed": "FAILED"}


def job_state(entry: dict[str, Any]) -> JobState | None:
    """State of the job of an entry in the record's `jobs`; None if the scheduler cannot report it."""
    if entry["target"] == "kubernetes":
        return _from_kubectl(entry)
    return slurm.job_state(entry["id"])


def cancel_job(entry: dict[str, Any], gently: bool) -> None:
    """Cancel the job. On Kubernetes `gently` has no effect: pods always get SIGTERM and a grace period."""
    if entry["target"] == "slurm":
        return slurm.cancel(entry["id"], gently)
    done = _kubectl(
        "delete", f"--namespace={entry['namespace']}", "--wait=false", "--", entry["id"]
    )
    if done.returncode:
        raise LaunchError(f"kubectl delete: {done.stderr.strip()}")


def _from_kubectl(entry: dict[str, Any]) -> JobState | None:
    """State from the object's conditions: the last one whose status is True."""
    done = _kubectl("get", f"--namespace={entry['namespace']}", "--output=json", "--", entry["id"])
    if done.returncode:
        return None
    status = json.loads(done.stdout).get("status", {})
    conditions = status.get("conditions", [])
    true = [one for one in conditions if one.get("status") == "True"]
    if not true:
        return JobState(
            "RUNNING" if conditions or status.get("active") else "PENDING", "", "", "kubectl"
        )
    last = true[-1]
    state = _FINAL_CONDITIONS.get(last["type"], last["type"].upper())
    return JobState(state, last.get("message", ""), "", "kubectl")


def _kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_KUBECTL_S, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(
            command, 127, "", "kubectl is not on this machine's PATH"
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "kubectl did not answer")
