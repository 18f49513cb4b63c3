"""status and cancel of Kubernetes jobs.

No API server can be had here, so kubectl is stood in for by a script that answers as it does.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from drumline.cluster.jobs import cancel_job, job_state

ENTRY = {"target": "kubernetes", "id": "trainjob/a", "namespace": "train"}


def kubectl(folder: Path, answer: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes how it is called."""
    (folder / "answer").write_text(json.dumps(answer))
    script = f'#!/bin/sh\necho "$@" >> {folder}/calls\ncat {folder}/answer\nexit {code}\n'
    (folder / "kubectl").write_text(script)
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "calls"


@pytest.mark.parametrize(
    ("conditions", "state", "reason"),
    [
        ([], "PENDING", ""),
        ([{"type": "Suspended", "status": "False"}], "RUNNING", ""),
        ([{"type": "Suspended", "status": "True", "message": "by quota"}], "SUSPENDED", "by quota"),
        ([{"type": "Complete", "status": "True", "message": "all pods"}], "COMPLETED", "all pods"),
        (
            [
                {"type": "Suspended", "status": "False"},
                {"type": "Failed", "status": "True", "message": "oom"},
            ],
            "FAILED",
            "oom",
        ),
    ],
)
def test_the_state_is_that_of_the_newest_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditions: Any, state: str, reason: str
) -> None:
    """With its message."""
    calls = kubectl(tmp_path, {"status": {"conditions": conditions}}, 0, monkeypatch)
    found = job_state(ENTRY)
    assert found
    assert (found.state, found.reason, found.source) == (state, reason, "kubectl")
    assert found.is_final is (state in ("COMPLETED", "FAILED"))
    assert calls.read_text() == "get --namespace=train --output=json -- trainjob/a\n"


def test_a_plain_job_has_no_condition_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts its active pods instead."""
    kubectl(tmp_path, {"status": {"active": 2}}, 0, monkeypatch)
    found = job_state({**ENTRY, "id": "job/a"})
    assert found
    assert found.state == "RUNNING"


def test_cancel_deletes_and_what_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kind and name, in its namespace."""
    calls = kubectl(tmp_path, {}, 0, monkeypatch)
    cancel_job(ENTRY, gently=True)
    assert calls.read_text() == "delete --namespace=train --wait=false -- trainjob/a\n"
    kubectl(tmp_path, {}, 1, monkeypatch)
    assert job_state(ENTRY) is None
