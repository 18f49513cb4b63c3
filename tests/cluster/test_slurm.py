"""Training on a real Slurm: submitted, warned, killed, preempted, split over other nodes, refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from desk import ALONE, FOUR, Desk, write_recipe
from lab import NODES, Lab, wait
from one_slurm import slurm

from conftest import SOURCES
from drumline.rank_files import RankFiles
from drumline.runs.folder import RunFolder

__all__ = ["slurm"]
pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]


@pytest.fixture
def desk(slurm: Lab, tmp_path: Path) -> Desk:
    return Desk(slurm, tmp_path)


@pytest.fixture(scope="module")
def straight(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Forty steps on two nodes of two ranks, undisturbed."""
    made = Desk(slurm, tmp_path_factory.mktemp("straight"))
    made.wait_for_job(made.submit(*FOUR))
    return made


@pytest.fixture(scope="module")
def two(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """The same on two nodes of one rank."""
    made = Desk(slurm, tmp_path_factory.mktemp("two"))
    made.wait_for_job(made.submit())
    return made


def test_two_nodes_of_two_ranks(straight: Desk) -> None:
    """COMPLETED; the metrics and weights are those of four ranks on this machine without Slurm."""
    (attempt,) = straight.attempts()
    assert attempt["outcome"] == "finished"
    assert "start in job" in attempt["cause"]
    assert attempt["command"][0] == "srun"
    assert attempt["split"] == {"per_device": 3, "gpus": 4, "accumulation": 1}
    straight.drumline("run", "r.yaml", *FOUR, "cluster.gpus_per_node=4", "--run-dir", "here")
    assert straight.numbers() == straight.numbers("here")
    assert straight.record()["weights"] == straight.record("here")["weights"]
    status = json.loads(straight.drumline("status", "r", "--json").stdout)
    assert (status["state"], status["step"], status["jobs"][0]["state"]) == (
        "finished",
        40,
        "COMPLETED",
    )
    assert "finished at step 40" in straight.drumline("logs", "r").stdout


def test_warned_before_the_time_limit_it_goes_on_and_is_bitwise_the_same(
    straight: Desk, two: Desk, desk: Desk
) -> None:
    """USR1 to two scripts: saved on all ranks; one is requeued once, of a chain the next job goes on, bitwise."""
    alone = desk.submit(*FOUR, name="alone")
    desk.submit(name="chain", options=["--chain", "2"])
    first, second = (entry["id"] for entry in desk.record("chain")["jobs"])
    assert "Dependency" in desk.drumline("status", "chain").stdout
    for name, job in (("alone", alone), ("chain", first)):
        desk.wait_for_step(5, name)
        desk.lab.ask("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: len(desk.attempts("alone")) == len(desk.attempts("chain")) == 2, 120)
    for name, job, undisturbed in (("alone", alone, straight), ("chain", second, two)):
        desk.wait_for_job(job)
        before, after = desk.attempts(name)
        assert (before["outcome"], after["outcome"]) == ("stopped", "finished")
        assert after["from_step"] == before["step"]
        assert desk.record(name)["weights"] == undisturbed.record()["weights"]
        assert desk.numbers(name) == undisturbed.numbers()
    assert desk.lab.job(alone)["Restarts"] == "1"


def test_a_rank_or_whoever_attends_is_killed(two: Desk, desk: Desk) -> None:
    """SIGKILL of a rank on the second node: another attempt in the same job; of the supervisor: another start."""
    jobs = {name: desk.submit(name=name) for name in ("rank", "supervisor")}
    for name in jobs:
        desk.wait_for_step(14, name)
        rank = RankFiles(desk.folder / name / "logs/attempt-0", 1).process()
        killed = rank if name == "rank" else RunFolder(desk.folder / name).supervisor()
        assert killed
        killed.send(signal.SIGKILL)
    wait(lambda: len(desk.attempts("supervisor")) == 2, 120)
    for name, job in jobs.items():
        desk.wait_for_job(job)
        assert [a["kind"] for a in desk.attempts(name)] == ["lost", "finished"]
        assert desk.record(name)["restarts"] == 1
        assert desk.record(name)["weights"] == two.record()["weights"]
        assert desk.numbers(name) == two.numbers()
    assert desk.lab.job(jobs["rank"])["Restarts"] == "0"
    assert desk.lab.job(jobs["supervisor"])["Restarts"] == "1"


SIXTEEN = ["batch.effective=16", "batch.per_device=4"]
WIDE = [*SIXTEEN, "batch.gpus=4", "cluster.nodes={min: 1, max: 4}"]


@dataclass
class Losses:
    """Three jobs of a user, the nodes that each was given, and the one of them that was lost."""

    desk: Desk
    hosts: dict[str, list[str]]
    lost: dict[str, str]


@pytest.fixture(scope="class")
def losses(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Losses]:
    """Each job loses a node while it trains; nobody is left on it to tell Slurm."""
    desk = Desk(slurm, tmp_path_factory.mktemp("losses"))
    write_recipe(desk.folder, "        time.sleep(0.25)")
    wanted = {"fewer": WIDE, "last": [], "first": ["cluster.nodes={min: 1, max: 2}"]}
    hosts = {}
    for name, overrides in wanted.items():
        desk.jobs[name] = job = desk.submit(*overrides, "checkpoint.every_steps=5", name=name)
        hosts[name] = wait(lambda job=job: slurm.hosts_of(job), 20)
    assert len({host for some in hosts.values() for host in some}) == 4 + 2 + 2
    lost = {name: some[0 if name == "first" else -1] for name, some in hosts.items()}
    try:
        for name, node in lost.items():
            desk.wait_for_step(8, name)
            slurm.kill_node(node)
        yield Losses(desk, hosts, lost)
    finally:
        desk.bring_back(lost.values())


class TestLostNodes:
    """What becomes of the three jobs."""

    def test_a_node_that_is_lost_leaves_a_run_on_fewer(self, losses: Losses) -> None:
        """Four nodes, one dies: of the three that are left two go on and one idles, in the same job; the same training."""
        desk = losses.desk
        job, hosts = desk.jobs["fewer"], losses.hosts["fewer"]
        here = ["batch.gpus=2", "batch.accumulation=2", "cluster.gpus_per_node=2"]
        desk.drumline("run", "r.yaml", *SIXTEEN, *here, "--run-dir", "here")
        split = {"per_device": 4, "gpus": 2, "accumulation": 2}
        wait(lambda: desk.attempts("fewer")[-1]["split"] == split, 150)
        assert desk.lab.hosts_of(job) == hosts[:3]  # or Slurm would end the job for the dead one
        desk.wait_for_job(job)
        told = desk.attempts("fewer")
        assert (
            f"{hosts[3]} does not answer; goes on with 2 nodes; idle, because no split uses more: {hosts[2]}"
            in told[-1]["cause"]
        )
        assert [a["outcome"] for a in told] == ["failed", "finished"]
        assert desk.lab.job(job)["Restarts"] == "0"
        ours, theirs = desk.numbers("fewer"), desk.numbers("here")
        assert [line[3] for line in ours] == [line[3] for line in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[1] == pytest.approx(other[1], rel=1e-5)

    @pytest.mark.parametrize("name", ["last", "first"])
    def test_lost_nodes_that_a_job_cannot_spare(self, two: Desk, losses: Losses, name: str) -> None:
        """Of one job the last of two nodes, of another the first, with its script: both go on elsewhere, bitwise."""
        desk = losses.desk
        desk.wait_for_job(desk.jobs[name])
        before, after = desk.attempts(name)
        assert (before["outcome"], after["outcome"]) == ("failed", "finished")
        assert after["from_step"] >= 5
        assert losses.lost[name] not in after["cause"].partition(" on ")[2]
        assert desk.record(name)["restarts"] == 1
        assert desk.record(name)["weights"] == two.record()["weights"]


def test_preempted_by_an_urgent_job(two: Desk, desk: Desk) -> None:
    """Slurm takes the nodes: saved within its grace, requeued by Slurm, finished afterwards, bitwise."""
    job = desk.submit()
    desk.wait_for_step(5)
    nodes = desk.lab.job(job)["NodeList"]
    urgent = desk.lab.ask("sbatch", "--parsable", "--partition=urgent", f"--nodelist={nodes}", "--exclusive",
                          "--time=1", "--output=/dev/null", "--wrap=sleep 3").strip()  # fmt: skip
    wait(lambda: desk.lab.job(urgent).get("JobState") == "COMPLETED", 90)
    desk.wait_for_job(job)
    first, second = desk.attempts()
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished")
    assert desk.record()["weights"] == two.record()["weights"]


SLEEPS = (
    "        flag = Path(__file__).with_name('slept')\n"
    "        if self.seen == 20 and os.environ['RANK'] == '1' and not flag.exists():\n"
    "            flag.touch()\n            time.sleep(3600)"
)
TROUBLES = {  # what the model does, and how it is submitted
    "cancelled": ("        time.sleep(0.15)", ["duration.steps=400"]),
    "sleeps": (SLEEPS, ["launch.hang_timeout_s=8.0"]),
    "crashes": (
        "        assert self.seen < 12, 'planted crash'",
        ["checkpoint.every_steps=100", *ALONE],
    ),
    "straggles": (
        "        time.sleep(0.3 if os.environ['RANK'] == '1' else 0.06)",
        ["duration.steps=45"],
    ),
}


@pytest.fixture(scope="module")
def troubles(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Desk]:
    """Four jobs at the same time, each with a trouble of its own."""
    desks = {}
    for name, (body, overrides) in TROUBLES.items():
        desks[name] = desk = Desk(slurm, tmp_path_factory.mktemp(name))
        write_recipe(desk.folder, body)
        desk.jobs["r"] = desk.submit(*overrides)
    return desks


def test_cancelled_it_has_saved_and_is_not_requeued(troubles: dict[str, Desk]) -> None:
    """`drumline cancel`: exit 75 in the job, a checkpoint, and `resume` goes on from it without Slurm."""
    desk = troubles["cancelled"]
    desk.wait_for_step(3)
    assert "asked to save and stop" in desk.drumline("cancel", "r").stdout
    desk.wait_for_job(desk.jobs["r"], "FAILED", "CANCELLED")
    (attempt,) = desk.attempts()
    assert attempt["outcome"] == "stopped"
    assert (desk.folder / f"r/checkpoints/step-{attempt['step']:08d}").is_dir()
    assert "nothing runs" in desk.drumline("cancel", "r", code=2).stderr


def test_a_rank_that_sleeps(troubles: dict[str, Desk]) -> None:
    """Found within twice the timeout, named, the stacks of all ranks in their logs, restarted, finished."""
    desk = troubles["sleeps"]
    desk.wait_for_job(desk.jobs["r"])
    first, second = desk.attempts()
    assert (first["kind"], second["outcome"]) == ("hang", "finished")
    assert "rank 1" in first["message"]
    log = desk.folder / "r/logs/attempt-0"
    assert "strange.py" in (log / "rank-1.log").read_text()
    assert all("most recent call first" in (log / f"rank-{r}.log").read_text() for r in (0, 1))
    last = [
        json.loads((log / f"rank-{r}.collectives.json").read_text())["entries"][-1] for r in (0, 1)
    ]
    assert {entry["process_group"][1] for entry in last} == {"default_pg"}
    slept = os.stat(log / "ended").st_mtime - os.stat(log / "rank-1.heartbeat").st_mtime
    assert 8.0 <= slept < 16.0


def test_a_crash_loop_is_stopped(troubles: dict[str, Desk]) -> None:
    """The same step fails twice: no progress, said in the job's log and in the record; nothing requeued."""
    desk = troubles["crashes"]
    job = desk.jobs["r"]
    desk.wait_for_job(job, "FAILED")
    assert len(desk.attempts()) == 2
    assert "no progress since step" in desk.drumline("logs", "r").stdout
    assert "planted crash" in desk.attempts()[-1]["message"]
    assert desk.lab.job(job)["Restarts"] == "0"
    assert desk.lab.job(job)["ExitCode"] == "4:0"


def test_a_straggler_is_named_with_its_host(troubles: dict[str, Desk]) -> None:
    """A rank whose forwards take five times the others': one line in the job's log, and the run goes on."""
    desk = troubles["straggles"]
    job = desk.jobs["r"]
    desk.wait_for_job(job)
    log = (desk.folder / f"r/logs/job-{job}.log").read_text()
    assert log.count("straggler: rank 1 on ") == 1
    assert "straggler: rank 0" not in log


def test_a_slow_node_is_left_out_after_the_pre_flight(desk: Desk) -> None:
    """All-reduces of one node take 0.6 s longer: it is named with its figures, and the run starts on others."""
    (desk.folder / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('SLURMD_NODENAME') == 'node1' and 'RANK' in os.environ:\n"
        "    import time\n    import torch.distributed as dist\n    real = dist.all_reduce\n"
        "    dist.all_reduce = lambda *a, **k: (time.sleep(0.6), real(*a, **k))[1]\n"
    )
    desk.site(
        setup=[f"export PYTHONPATH={desk.folder}:$PYTHONPATH"], slow_node_ratio=0.08
    )  # other tests may slow the others down tenfold
    job = desk.submit(*WIDE, "duration.steps=4", options=["--preflight"])
    desk.wait_for_job(job)
    (attempt,) = desk.attempts()
    assert "without node1, slow in the pre-flight" in attempt["cause"]
    log = (desk.folder / f"r/logs/job-{job}.log").read_text()
    assert "node1: all-reduce with a neighbour " in log
    report = json.loads((desk.folder / "r/preflight.json").read_text())
    others = [node["host"] for node in report["nodes"] if node["host"] != "node1"]
    assert len(others) == 3
    assert f"--nodelist={','.join(others[:2])}" in attempt["command"]


def test_the_other_launchers_through_srun(two: Desk, desk: Desk) -> None:
    """Accelerate and DeepSpeed on two nodes: the losses and digests are torchrun's."""
    jobs = {
        launcher: desk.submit(f"launch.launcher={launcher}", name=launcher)
        for launcher in ("accelerate", "deepspeed")
    }
    theirs = two.numbers()
    assert len(theirs) == 40
    for launcher, job in jobs.items():
        desk.wait_for_job(job)
        for mine, other in zip(desk.numbers(launcher), theirs, strict=True):
            assert mine[3] == other[3]
            assert mine[1] == pytest.approx(other[1], rel=1e-6)


def test_a_sweep_is_one_array(desk: Desk) -> None:
    """Two tasks, two folders, one report; `logs -f` ends with the run that it follows."""
    write_recipe(desk.folder, "        pass")
    few = [*ALONE, "duration.steps=5"]
    done = desk.drumline("sweep", "r.yaml", "optimizer.lr=1e-3,3e-3", *few, "--to", "slurm", "--site", "site.yaml",
                         "--folder", "all")  # fmt: skip
    runs = sorted(path.parent for path in (desk.folder / "all").glob("0*/record.json"))
    assert len(runs) == 2, done.stderr
    for run in runs:
        told = desk.drumline("logs", "-f", str(run)).stdout
        assert "finished at step 5" in told
        assert json.loads(desk.drumline("status", str(run), "--json").stdout)["state"] == "finished"
    first, second = (desk.numbers(str(run)) for run in runs)
    assert [line[3] for line in first] == [line[3] for line in second]
    assert first[-1][1] != second[-1][1]
    desk.drumline("report", *map(str, runs), "--output", "both.html")
    assert (desk.folder / "both.html").stat().st_size > 10_000


def test_a_job_s_nodes_are_measured_by_doctor(desk: Desk) -> None:
    """`drumline doctor --preflight` in a batch script of two nodes: a row for each, links between them too."""
    command = f"{sys.executable} -m drumline.cli doctor --preflight --ratio 0.01 --json"
    job = desk.lab.ask("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", f"--chdir={desk.folder}", f"--wrap={command}",
                       "--output=out.json", "--error=err.txt", f"--export=ALL,PYTHONPATH={SOURCES}").strip()  # fmt: skip
    wait(lambda: desk.lab.job(job).get("JobState") in ("COMPLETED", "FAILED"), 120)
    text = (desk.folder / "out.json").read_text()
    assert text, (desk.folder / "err.txt").read_text()
    first, second = json.loads(text)["nodes"]
    assert first["host"] != second["host"]
    assert min(first["between"], second["between"]) > 0  # each by its own slowest rank


@pytest.mark.timeout(1200)
def test_ten_jobs_at_once_keep_apart(slurm: Lab, tmp_path: Path) -> None:
    """Submitted together, several on each node: ten folders, ten ids, and the trainings of each split the same."""
    desk = Desk(slurm, tmp_path)
    desk.site(cpus_per_node=1)
    write_recipe(tmp_path, "        pass")
    submit = [sys.executable, "-m", "drumline.cli", "submit", "r.yaml", "duration.steps=5", "--site", "site.yaml", "--json"]  # fmt: skip
    env = {**os.environ, **slurm.environment, "PYTHONPATH": SOURCES}
    started = [subprocess.Popen([*submit, *(ALONE if number > 2 else [])], cwd=tmp_path, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for number in range(10)]  # fmt: skip
    found = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(json.loads(out))
    assert (
        len({facts["run"] for facts in found}) == len({facts["jobs"][0] for facts in found}) == 10
    )
    for facts in found:
        desk.wait_for_job(facts["jobs"][0], seconds=240)
    for split in (found[:3], found[3:]):
        records = [json.loads((Path(f["run"]) / "record.json").read_text()) for f in split]
        assert len({record["weights"]["checksum"] for record in records}) == 1


def test_what_slurm_refuses_is_one_message_and_nothing_stays(
    slurm: Lab, desk: Desk, tmp_path: Path
) -> None:
    """Unknown partition, node or option, no sbatch, a controller that is down: exit 2, no folder, no job."""
    before = slurm.ask("squeue", "-h", "-o", "%A")
    for site, words in (
        (
            {"partition": "nowhere"},
            "partition: nowhere: Slurm has no such partition. Nearest: batch",
        ),
        ({"sbatch": ["--nodelist=node99"]}, "Invalid node name specified"),
        ({"sbatch": ["--no-such-option"]}, "unrecognized option '--no-such-option'"),
    ):
        desk.site(**site)
        message = desk.submit(code=2)
        assert words in message.splitlines()[-1], message
        assert not (tmp_path / "r").exists()
    desk.site(partition="nowhere")
    for values, words in (
        ("optimizer.lr=1e-3,3e-3", "Slurm has no such partition"),
        ("batch.gpus=1,2", "batch.gpus 1 on 1 node, batch.gpus 2 on 2 nodes, and an array has one"),
    ):
        sweep = ["r.yaml", values, "--to", "slurm", "--site", "site.yaml", "--folder", "all"]
        assert words in desk.drumline("sweep", *sweep, code=2).stderr
        assert not (tmp_path / "all").exists()
    desk.site()
    done = desk.drumline("submit", "r.yaml", "--run-dir", "r", code=2, PATH="/nowhere")
    assert "sbatch is not on this machine's PATH" in done.stderr
    broken = tmp_path / "slurm.conf"
    text = Path(slurm.environment["SLURM_CONF"]).read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    broken.write_text(
        text.replace(port, "SlurmctldPort=1").replace("MessageTimeout=10", "MessageTimeout=2")
    )
    done = desk.drumline("submit", "r.yaml", "--run-dir", "r", code=2, SLURM_CONF=str(broken))
    assert "the controller is down, or SLURM_CONF names another one" in done.stderr
    assert not (tmp_path / "r").exists()
    assert slurm.ask("squeue", "-h", "-o", "%A") == before


@pytest.mark.parametrize(
    ("partition", "reason"), [("closed", "PartitionDown"), ("batch", "Resources")]
)
def test_a_partition_that_is_full_or_down_is_told_by_status(
    desk: Desk, partition: str, reason: str
) -> None:
    """The job waits; status gives Slurm's reason; cancel takes it out of the queue."""
    others = desk.lab.ask("sbatch", "--parsable", f"--nodes={NODES}", "--exclusive", "--time=1", "--output=/dev/null",
                          "--wrap=sleep 60").strip()  # fmt: skip
    wait(lambda: desk.lab.job(others).get("JobState") == "RUNNING", 30)
    desk.site(partition=partition)
    job = desk.submit()
    wait(lambda: desk.lab.job(job).get("Reason") == reason, 20)
    status = desk.drumline("status", "r").stdout
    assert status.startswith("pending  step 0/")
    assert f"job {job}  PENDING ({reason})" in status
    assert f"job {job}: cancelled" in desk.drumline("cancel", "r").stdout
    desk.wait_for_job(job, "CANCELLED")
    desk.lab.ask("scancel", others)


def test_a_run_folder_that_the_nodes_do_not_see(desk: Desk) -> None:
    """On another file system: the job fails, no restart, and `status` asks whether the node sees it."""
    job = desk.submit("duration.steps=4", options=["--hold"])
    moved = desk.folder / "elsewhere"
    (desk.folder / "r").rename(moved)
    desk.lab.ask("scontrol", "release", job)
    desk.wait_for_job(job, "FAILED")
    assert desk.lab.job(job)["Restarts"] == "0"
    assert not (desk.folder / "r").exists()
    status = desk.drumline("status", "elsewhere").stdout
    assert f"job {job}  FAILED (JobLaunchFailure: is the run folder visible on the node?)" in status


def test_what_does_not_fit_is_not_submitted(desk: Desk) -> None:
    """Exit 3, no folder, no job."""
    desk.site(gpu="h100-80gb", gpus_per_node=8)
    done = desk.drumline(
        "submit",
        "llama-8b-8xh100",
        "strategy={name: ddp, shard: all}",
        "--site",
        "site.yaml",
        "--run-dir",
        "r",
        code=3,
    )
    assert "memory: " in done.stderr
    assert not (desk.folder / "r").exists()
