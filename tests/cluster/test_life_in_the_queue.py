"""Day two on a real Slurm: what was submitted trains, jobs say how they end, runs live by their folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
from desk import ALONE, Desk, write_recipe
from lab import Lab, wait
from one_slurm import slurm

from drumline.cluster import slurm as slurm_commands
from drumline.recipe import yaml12

__all__ = ["slurm"]
pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]

SHORT = [*ALONE, "duration.steps=6"]
PROJECT = (
    "from torch import nn\n\nfrom parts import activation\n\n\ndef make(features, hidden, classes):\n"
    "    return nn.Sequential(nn.Linear(features, hidden), activation(), nn.Linear(hidden, classes))\n"
)


@pytest.fixture
def desk(slurm: Lab, tmp_path: Path) -> Desk:
    made = Desk(slurm, tmp_path)
    write_recipe(tmp_path, "        pass")
    return made


def use_project(desk: Desk) -> None:
    """A model from two files, and rows from a text file."""
    (desk.folder / "strange.py").write_text(PROJECT)
    (desk.folder / "parts.py").write_text("from torch.nn import GELU as activation  # noqa: F401\n")


def test_what_was_submitted_is_what_trains(desk: Desk) -> None:
    """Held, then recipe, code, a file that it imports and the site edited, released: the same run bitwise; requeued too."""
    use_project(desk)
    (desk.folder / "strange.py").write_text(PROJECT + "import time\ntime.sleep(0)\n")
    desk.drumline("run", "r.yaml", *SHORT, "--run-dir", "here")
    job = desk.submit(*SHORT, name="frozen", options=["--hold"])
    twice = desk.submit(*ALONE, "duration.steps=400", name="requeued", options=["--hold"])
    desk.drumline("run", "r.yaml", *ALONE, "duration.steps=400", "--run-dir", "long")
    assert desk.drumline("status", "frozen").stdout.startswith("pending  step 0/6")
    (desk.folder / "parts.py").write_text("from torch.nn import ReLU as activation  # noqa: F401\n")
    (desk.folder / "strange.py").write_text("raise SystemExit('edited')\n")
    (desk.folder / "r.yaml").write_text("recipe: other\n")
    (desk.folder / "site.yaml").write_text("site: other\nsetup: ['exit 9']\n")
    for one in (job, twice):
        desk.lab.ask("scontrol", "release", one)
    wait(lambda: len(desk.steps("requeued")) > 10, 120)
    desk.lab.ask("scancel", "--signal=USR1", "--batch", twice)
    desk.wait_for_job(job)
    desk.wait_for_job(twice)
    for name, other in (("frozen", "here"), ("requeued", "long")):
        assert desk.numbers(name) == desk.numbers(other)
        assert desk.record(name)["weights"] == desk.record(other)["weights"]
        assert [attempt["changed"] for attempt in desk.attempts(name)] == [{}] * len(
            desk.attempts(name)
        )
    assert len(desk.attempts("requeued")) == 2
    assert desk.record("frozen")["recipe"]["project"] == str(desk.folder / "frozen/code")
    record = desk.record("frozen")
    assert set(record["code"]["factories"]) == {"strange.py", "parts.py"}


def test_what_cannot_be_frozen_is_compared(desk: Desk) -> None:
    """The copy itself edited: told and recorded. The corpus edited: refused, in the job's note and in status."""
    use_project(desk)
    edited = desk.submit(*SHORT, name="edited", options=["--hold"])
    (desk.folder / "rows.csv").write_text("x,label\n" + "1,0\n" * 40)
    text = yaml12.dump(CORPUS)
    (desk.folder / "c.yaml").write_text(text)
    (desk.folder / "corpus.txt").write_text("some text " * 400)
    done = desk.drumline(
        "submit", "c.yaml", "--site", "site.yaml", "--run-dir", "data", "--hold", "--json"
    )
    data = json.loads(done.stdout)["jobs"][0]
    (desk.folder / "edited/code/parts.py").write_text(
        "from torch.nn import ReLU as activation  # noqa: F401\n"
    )
    (desk.folder / "corpus.txt").write_text("other text " * 400)
    for job in (edited, data):
        desk.lab.ask("scontrol", "release", job)
    desk.wait_for_job(edited)
    (attempt,) = desk.attempts("edited")
    assert list(attempt["changed"]) == ["file parts.py"]
    log = (desk.folder / f"edited/logs/job-{edited}.log").read_text()
    assert "changed since the run was recorded: file parts.py: " in log
    desk.wait_for_job(data, "FAILED")
    assert desk.lab.job(data)["ExitCode"] == "2:0"
    status = desk.drumline("status", "data").stdout
    assert status.startswith("failed before it began  step 0/")
    assert "exit code 2: drumline: " in status
    assert "data fingerprint changed since the job was submitted" in status


CORPUS = {
    "recipe": "corpus", "schema": 1, "seed": 1,
    "model": {"source": "config", "architecture": "gpt2",
              "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 300}},
    "data": {"source": "files", "path": "corpus.txt", "task": "causal_lm", "sequence_length": 16},
    "batch": {"effective": 4, "per_device": 4, "gpus": 1},
    "optimizer": {"name": "adamw", "lr": 1e-3}, "duration": {"steps": 3},
}  # fmt: skip


def test_jobs_that_end_before_they_train_say_why(desk: Desk) -> None:
    """A set-up line that fails, a python that is missing, a job that is held: Slurm's reason, then the script's."""
    desk.site(setup=["true || false", "false | true", "cd /nowhere-at-all", "touch reached"])
    setup = desk.submit(*SHORT, name="setup")
    desk.site(python="/nowhere/python")
    python = desk.submit(*SHORT, name="python")
    desk.site()
    desk.submit(*SHORT, name="held", options=["--hold"])
    desk.wait_for_job(setup, "FAILED")
    desk.wait_for_job(python, "FAILED")
    assert not (desk.folder / "setup/reached").exists()
    told = desk.drumline("status", "setup").stdout
    assert told.startswith("failed before it began")
    assert "FAILED (NonZeroExitCode)" in told
    assert "set-up failed with exit code 1: cd /nowhere-at-all" in told
    told = desk.drumline("status", "python").stdout
    assert "exit code 127: " in told
    assert "/nowhere/python" in told
    told = desk.drumline("status", "held").stdout
    assert told.startswith("pending")
    assert "JobHeldUser: held; scontrol release lets it start" in told
    desk.drumline("cancel", "held")


def test_a_cancelled_run_stays_cancelled_whoever_started_its_job(desk: Desk) -> None:
    """Cancelled, given to sbatch by hand, cancelled again: saved, CANCELLED, not started again, in status; resumed in the queue."""
    slow = f"        time.sleep(0 if Path({str(desk.folder / 'fast')!r}).exists() else 0.3)"
    write_recipe(desk.folder, slow)
    first = desk.submit(*ALONE, "duration.steps=150")
    desk.wait_for_step(4)
    desk.drumline("cancel", "r")
    desk.wait_for_job(first, "CANCELLED")
    by_hand = desk.lab.ask("sbatch", "--parsable", str(desk.folder / "r/job.sh")).strip()
    wait(
        lambda: len(desk.attempts()) == 2 and desk.steps()[-1]["step"] > desk.attempts()[0]["step"],
        120,
    )
    assert f"job {by_hand}  RUNNING" in desk.drumline("status", "r").stdout
    refused = desk.drumline("resume", "r", "--to", "slurm", code=2).stderr
    assert f"job {by_hand} is running" in refused or "another process is running it" in refused
    assert f"job {by_hand}: asked to save and stop" in desk.drumline("cancel", "r").stdout
    desk.wait_for_job(by_hand, "CANCELLED")
    assert desk.lab.job(by_hand)["Restarts"] == "0"
    (desk.folder / "fast").touch()
    before = sorted(path.name for path in (desk.folder / "r").iterdir())
    never = ("resume", "r", "--to", "slurm", "--partition", "nowhere")
    assert "Slurm has no such partition" in desk.drumline(*never, code=2).stderr
    assert sorted(path.name for path in (desk.folder / "r").iterdir()) == before
    again = desk.drumline(
        "resume", "r", "--to", "slurm", "--time", "5", "--qos", "normal", "--json"
    ).stdout
    again = json.loads(again)["jobs"][0]
    asked = desk.lab.job(again)
    assert asked["TimeLimit"] == "00:05:00"
    desk.wait_for_job(again)
    assert [a["outcome"] for a in desk.attempts()] == ["stopped", "stopped", "finished"]
    desk.drumline("run", "r.yaml", *ALONE, "duration.steps=150", "--run-dir", "straight")
    assert desk.numbers() == desk.numbers("straight")
    finished = desk.drumline("resume", "r", "--to", "slurm", code=2).stderr
    assert "duration.steps=N` makes another run that goes on from it" in finished


def test_a_chain_s_unfinished_links_are_completed(desk: Desk) -> None:
    """The first of two links is stopped before its limit: COMPLETED, so that no mail calls it failed."""
    write_recipe(desk.folder, "        time.sleep(0.1)")
    desk.submit(*ALONE, "duration.steps=40", options=["--chain", "2"])
    first, second = (entry["id"] for entry in desk.record()["jobs"])
    desk.wait_for_step(4)
    desk.lab.ask("scancel", "--signal=USR1", "--batch", first)
    desk.wait_for_job(first, "COMPLETED")
    desk.wait_for_job(second, "COMPLETED")
    assert desk.record()["outcome"] == "finished"


def test_a_waiting_job_is_given_no_nodes_to_insist_on(
    slurm: Lab, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has requeued a job for a lost node before drumline releases it: nothing is required of the next start."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    job = slurm.ask(
        "sbatch",
        "--parsable",
        "--hold",
        "--nodes=2",
        "--time=1",
        "--output=/dev/null",
        "--wrap=true",
    ).strip()
    assert slurm_commands.keep_only(job, ["node0"]) == "Slurm has requeued the job meanwhile"
    assert slurm.job(job)["ReqNodeList"] == "(null)"
    slurm.ask("scancel", job)
    job = slurm.ask("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=sleep 60")
    job = job.strip()
    wait(lambda: slurm.job(job)["JobState"] == "RUNNING", 60)
    requeue_at_the_first_update(desk.folder / "bin", job)
    monkeypatch.setenv("PATH", f"{desk.folder / 'bin'}:{os.environ['PATH']}")
    slurm_commands.keep_only(job, ["node0"])  # requeued between the question and the command
    assert "NodeList=node0" in (desk.folder / "bin/updates").read_text()
    assert slurm.job(job)["JobState"] == "PENDING"
    assert slurm.job(job)["ReqNodeList"] == "(null)"
    slurm.ask("scancel", job)


def requeue_at_the_first_update(folder: Path, job: str) -> None:
    """A `scontrol` that requeues the job before it passes on an update, as Slurm may at that moment."""
    folder.mkdir()
    real = shutil.which("scontrol")
    script = folder / "scontrol"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = update ] && [ ! -e {folder}/updates ]; then
    echo "$@" > {folder}/updates
    {real} requeuehold {job}
    until {real} show job {job} | grep -q JobState=PENDING; do sleep 0.2; done
fi
exec {real} "$@"
"""
    )
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("site", "overrides", "words"),
    [
        ({"time_limit": "3-00:00:00"}, [], "time_limit: 3-00:00:00 is over the 02:00:00 of partition batch"),
        ({"time_limit": "UNLIMITED"}, [], "UNLIMITED is over the 02:00:00"),
        ({"cpus_per_node": 64}, [], "cpus_per_node: 64 of 8 cores; 0 of 8 nodes"),
        ({"memory_per_node": "900G"}, [], "memory_per_node: 900G of 15.6 GiB"),
        ({"partition": "nowhere"}, [], "partition: nowhere: Slurm has no such partition. Nearest: batch, closed, urgent"),
        ({}, ["batch.gpus=12", "batch.per_device=1"], "nodes: 12 are asked for, partition batch has 8"),
        ({"environment": ["NOT_SET_HERE"]}, [], "environment: NOT_SET_HERE is not set here"),
        ({"gpu": "h100-80gb", "gpus_per_node": 16, "gpu_type": "h100"}, ["cluster.gpu=h100-80gb"],
         "gpu_type: h100, the node has no named type"),
    ],
)  # fmt: skip
def test_what_could_never_start_is_not_submitted(
    desk: Desk, site: dict, overrides: list[str], words: str
) -> None:
    """Asked of Slurm before anything is written: one message with both figures, no folder, no job."""
    before = desk.lab.ask("squeue", "-h", "-o", "%A")
    desk.site(**site)
    message = desk.submit(*overrides, code=2)
    assert words in message.splitlines()[-1], message
    assert not (desk.folder / "r").exists()
    assert desk.lab.ask("squeue", "-h", "-o", "%A") == before


def test_an_admin_finds_who_a_job_is(desk: Desk) -> None:
    """Name, comment and output file say the run; an environment of the shell does not replace what the script states."""
    desk.site(mail={"user": "me@example.org", "events": ["fail"]}, sbatch=["--comment=two words"])
    done = desk.drumline("submit", "r.yaml", *SHORT, "--site", "site.yaml", "--run-dir", "my run", "--hold", "--json",
                         "--dependency", "singleton", SBATCH_TIMELIMIT="1", SBATCH_JOB_NAME="other", SBATCH_ARRAY_INX="0-3")  # fmt: skip
    facts = json.loads(done.stdout)
    (job,) = facts["jobs"]
    told = desk.lab.ask("scontrol", "show", "job", "-o", job)
    assert "JobName=my run " in told
    assert f"StdOut={facts['run']}/logs/slurm-{job}.out" in told
    assert "TimeLimit=00:10:00" in told
    assert "Comment=two words" in told
    assert "Dependency=singleton" in told
    assert "ArrayJobId" not in told
    desk.drumline("cancel", "my run")


def test_a_run_after_another_and_a_sweep_by_its_folder(desk: Desk) -> None:
    """`--after RUN` waits for its job; `status` and `cancel` of a sweep's folder are those of all its runs."""
    write_recipe(desk.folder, "        time.sleep(0.1)")
    first = desk.submit(*ALONE, "duration.steps=10", name="first")
    second = desk.submit(*SHORT, name="second", options=["--after", "first"])
    assert f"afterok:{first}" in desk.lab.ask("scontrol", "show", "job", "-o", second)
    (desk.folder / "c.yaml").write_text(yaml12.dump(CORPUS))
    (desk.folder / "corpus.txt").write_text("some text " * 400)
    desk.drumline("submit", "c.yaml", "--site", "site.yaml", "--run-dir", "lm")
    exported = desk.drumline("export", "lm", "model", "--to", "slurm").stdout.split()[1]
    assert "afterok:" in desk.lab.ask("scontrol", "show", "job", "-o", exported)
    desk.drumline("sweep", "r.yaml", "optimizer.lr=1e-3,3e-3", *ALONE, "duration.steps=400", "--to", "slurm", "--site",
                  "site.yaml", "--folder", "all", "--at-most", "1")  # fmt: skip
    wait(lambda: (desk.folder / "all/000/metrics.jsonl").exists(), 120)
    rows = desk.drumline("status", "all").stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["000", "running"], ["001", "pending"]]
    array = desk.record("all/000")["jobs"][0]["id"]
    assert (desk.folder / f"all/000/logs/job-{array}.log").exists()
    assert "job" in desk.drumline("logs", "all").stdout
    desk.drumline("cancel", "all")
    wait(lambda: not desk.lab.ask("squeue", "-h", "-n", "all").strip(), 90)
    assert "nothing runs" in desk.drumline("cancel", "all", code=2).stderr
    desk.wait_for_job(second)
    assert desk.record("second")["outcome"] == "finished"
    desk.wait_for_job(exported)
    assert (desk.folder / "model/model.safetensors").is_file()
