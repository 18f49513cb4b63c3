"""Training on a real Slurm: submitted, warned, killed, preempted, split over other nodes, refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_recipe
from lab import Lab, wait, why_not

from toolkit.metrics_file import read_metrics
from toolkit.rank_files import RankFiles
from toolkit.recipe import yaml12
from toolkit.runs.folder import RunFolder

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.heavy]

SITE = {
    "site": "lab",
    "partition": "batch",
    "cpus_per_node": 2,
    "time_limit": "00:10:00",
    "warning_s": 60,
}


def write_recipe(folder: Path, body: str = "        time.sleep(0.15)") -> str:
    """A recipe whose model does something at each forward, by default takes its time; the factory beside it."""
    (folder / "strange.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom torch import nn\n\n\nclass Strange(nn.Sequential):\n"
        f"    seen = 0\n\n    def forward(self, x):\n        self.seen += 1\n{body}\n        return super().forward(x)\n\n\n"
        "def make(features, hidden, classes):\n"
        "    return Strange(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, classes))\n"
    )
    recipe = tiny_recipe(project=".", model={"factory": "strange:make"}, duration={"steps": 40},
                         batch={"effective": 12, "per_device": 3, "gpus": 4}, cluster={"gpus_per_node": 2},
                         checkpoint={"every_steps": 10}, logging={"every_steps": 1},
                         schedule={"name": "cosine", "warmup_steps": 3})  # fmt: skip
    (folder / "r.yaml").write_text(yaml12.dump(recipe))
    return "r.yaml"


class Desk:
    """A user's folder on a login node of the lab."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.site()
        write_recipe(folder)

    def site(self, **changes: Any) -> None:
        """Write site.yaml."""
        (self.folder / "site.yaml").write_text(
            yaml12.dump({**SITE, "cache": os.environ["DRUMLINE_CACHE"], **changes})
        )

    def drumline(
        self, *arguments: str, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The real command; asserts its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "toolkit.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.lab.environment, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == code, done.stderr
        return done

    def submit(
        self,
        *overrides: str,
        name: str = "r",
        code: int = 0,
        options: Any = (),
    ) -> str:
        """The job's id."""
        done = self.drumline("submit", "r.yaml", *overrides, "--to", "slurm", "--site", "site.yaml", "--run-dir", name,
                             "--json", *options, code=code)  # fmt: skip
        return json.loads(done.stdout)["jobs"][-1] if code == 0 else done.stderr

    def record(self, name: str = "r") -> dict[str, Any]:
        return json.loads((self.folder / name / "record.json").read_text())  # type: ignore[no-any-return]

    def attempts(self, name: str = "r") -> list[dict[str, Any]]:
        return self.record(name)["attempts"]  # type: ignore[no-any-return]

    def steps(self, name: str = "r") -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / name / "metrics.jsonl") if "lr" in line]

    def numbers(self, name: str = "r") -> list[tuple[Any, ...]]:
        return [
            tuple(line[k] for k in ("step", "loss", "lr", "digest", "grad_norm"))
            for line in self.steps(name)
        ]

    def wait_for_step(self, step: int, name: str = "r") -> None:
        wait(lambda: (lines := self.steps(name)) and lines[-1]["step"] >= step, 120)

    def wait_for_idle(self, node: str) -> None:
        wait(
            lambda: "idle" in self.lab.ask("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%t"), 60
        )

    def wait_for_job(self, job: str, *states: str, seconds: float = 150) -> None:
        try:
            wait(lambda: self.lab.job(job).get("JobState") in (states or ("COMPLETED",)), seconds)
        except AssertionError:
            logs = [path.read_text() for path in sorted(self.folder.glob("*/logs/*.log"))]
            raise AssertionError(f"{self.lab.job(job)}\n" + "\n".join(logs)[-4000:]) from None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Four nodes, started and stopped here; a skip with the reason where Slurm cannot run."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("slurm")
    lab = Lab(folder / "lab")
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture
def desk(slurm: Lab, tmp_path: Path) -> Desk:
    return Desk(slurm, tmp_path)


@pytest.fixture(scope="module")
def straight(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Forty steps on two nodes of two ranks, undisturbed."""
    made = Desk(slurm, tmp_path_factory.mktemp("straight"))
    job = made.submit()
    made.wait_for_job(job)
    return made


def test_two_nodes_of_two_ranks(straight: Desk) -> None:
    """COMPLETED; the metrics and weights are those of four ranks on this machine without Slurm."""
    (attempt,) = straight.attempts()
    assert attempt["outcome"] == "finished"
    assert "start in job" in attempt["cause"]
    assert attempt["command"][0] == "srun"
    assert attempt["split"] == {"per_device": 3, "gpus": 4, "accumulation": 1}
    straight.drumline("run", "r.yaml", "cluster.gpus_per_node=4", "--run-dir", "here")
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
    straight: Desk, desk: Desk
) -> None:
    """USR1 to two scripts: saved on all ranks; one is requeued once, of a chain the next job goes on, bitwise."""
    alone = desk.submit(name="alone")
    desk.submit(name="chain", options=["--chain", "2"])
    first, second = (entry["id"] for entry in desk.record("chain")["jobs"])
    assert "Dependency" in desk.drumline("status", "chain").stdout
    for name, job in (("alone", alone), ("chain", first)):
        desk.wait_for_step(5, name)
        desk.lab.ask("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: len(desk.attempts("alone")) == len(desk.attempts("chain")) == 2, 120)
    for name, job in (("alone", alone), ("chain", second)):
        desk.wait_for_job(job)
        before, after = desk.attempts(name)
        assert (before["outcome"], after["outcome"]) == ("stopped", "finished")
        assert after["from_step"] == before["step"]
        assert desk.record(name)["weights"] == straight.record()["weights"]
        assert desk.numbers(name) == straight.numbers()
    assert desk.lab.job(alone)["Restarts"] == "1"


def test_a_rank_or_whoever_attends_is_killed(straight: Desk, desk: Desk) -> None:
    """SIGKILL of a rank on the second node: another attempt in the same job; of the supervisor: another start."""
    jobs = {name: desk.submit(name=name) for name in ("rank", "supervisor")}
    for name in jobs:
        desk.wait_for_step(14, name)
        rank = RankFiles(desk.folder / name / "logs/attempt-0", 3).process()
        killed = rank if name == "rank" else RunFolder(desk.folder / name).supervisor()
        assert killed
        killed.send(signal.SIGKILL)
    wait(lambda: len(desk.attempts("supervisor")) == 2, 120)
    for name, job in jobs.items():
        desk.wait_for_job(job)
        assert [a["kind"] for a in desk.attempts(name)] == ["lost", "finished"]
        assert desk.record(name)["restarts"] == 1
        assert desk.record(name)["weights"] == straight.record()["weights"]
        assert desk.numbers(name) == straight.numbers()
    assert desk.lab.job(jobs["rank"])["Restarts"] == "0"
    assert desk.lab.job(jobs["supervisor"])["Restarts"] == "1"


def test_a_node_that_is_lost_leaves_a_run_on_fewer(desk: Desk) -> None:
    """Four nodes, one dies: of the three that are left two go on and one idles, in the same job; the same training."""
    split = ["batch.effective=16", "batch.per_device=2"]
    here = ["batch.gpus=4", "batch.accumulation=2", "cluster.gpus_per_node=4"]
    desk.drumline("run", "r.yaml", *split, *here, "--run-dir", "here")
    wide = ["batch.gpus=8", "cluster.nodes={min: 1, max: 4}"]
    job = desk.submit(*split, *wide, "checkpoint.every_steps=5")
    desk.wait_for_step(8)
    lost = "node3"
    try:
        desk.lab.kill_node(lost)
        wait(lambda: len(desk.attempts()) >= 2 and desk.attempts()[-1]["split"]["gpus"] == 4, 150)
        assert (
            desk.lab.job(job)["NodeList"] == "node[0-2]"
        )  # or Slurm would end the job for the dead one
        desk.wait_for_job(job)
    finally:
        desk.lab.start_node(lost)
        desk.wait_for_idle(lost)
    last = desk.attempts()[-1]
    assert last["split"] == {"per_device": 2, "gpus": 4, "accumulation": 2}
    assert (
        "node3 does not answer; goes on with 2 nodes; idle, because no split uses more: node2"
        in last["cause"]
    )
    assert [a["outcome"] for a in desk.attempts()] == ["failed", "finished"]
    assert desk.lab.job(job)["Restarts"] == "0"
    ours, theirs = desk.numbers(), desk.numbers("here")
    assert [line[3] for line in ours] == [line[3] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[1] == pytest.approx(other[1], rel=1e-5)


def test_lost_nodes_that_a_job_cannot_spare(straight: Desk, desk: Desk) -> None:
    """Of one job the last of two nodes, of another the first, with its script: both go on elsewhere, bitwise."""
    write_recipe(desk.folder, "        time.sleep(0.25)")
    jobs = {"last": desk.submit("checkpoint.every_steps=5", name="last")}
    wait(lambda: desk.lab.job(jobs["last"]).get("NodeList") == "node[0-1]", 20)
    filler = desk.lab.ask("sbatch", "--parsable", "--nodelist=node0,node1", "--ntasks-per-node=1", "--time=5",
                          "--cpus-per-task=6", "--output=/dev/null", "--wrap=sleep 300").strip()  # fmt: skip
    wait(lambda: desk.lab.job(filler).get("JobState") == "RUNNING", 20)
    wide = ["cluster.nodes={min: 1, max: 2}", "checkpoint.every_steps=5"]
    jobs["first"] = desk.submit(*wide, name="first")
    wait(lambda: desk.lab.job(jobs["first"]).get("NodeList") == "node[2-3]", 20)
    desk.lab.ask("scancel", filler)
    lost = {"last": "node1", "first": "node2"}
    for name in jobs:
        desk.wait_for_step(8, name)
    try:
        for node in lost.values():
            desk.lab.kill_node(node)
        for name, job in jobs.items():
            desk.wait_for_job(job)
            assert [a["outcome"] for a in desk.attempts(name)] == ["failed", "finished"]
            assert desk.attempts(name)[1]["from_step"] >= 5
            assert lost[name] not in desk.attempts(name)[1]["cause"].partition(" on ")[2]
            assert desk.record(name)["restarts"] == 1
            assert desk.record(name)["weights"] == straight.record()["weights"]
    finally:
        for node in lost.values():
            desk.lab.start_node(node)
            desk.wait_for_idle(node)


def test_preempted_by_an_urgent_job(straight: Desk, desk: Desk) -> None:
    """Slurm takes the nodes: saved within its grace, requeued by Slurm, finished afterwards, bitwise."""
    job = desk.submit()
    desk.wait_for_step(5)
    urgent = desk.lab.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--time=1",
                          "--output=/dev/null", "--wrap=sleep 3").strip()  # fmt: skip
    wait(lambda: desk.lab.job(urgent).get("JobState") == "COMPLETED", 90)
    desk.wait_for_job(job)
    first, second = desk.attempts()
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished")
    assert desk.record()["weights"] == straight.record()["weights"]


def test_a_rank_that_sleeps(desk: Desk) -> None:
    """Found within twice the timeout, named, the stacks of all ranks in their logs, restarted, finished."""
    body = (
        "        flag = Path(__file__).with_name('slept')\n"
        "        if self.seen == 20 and os.environ['RANK'] == '2' and not flag.exists():\n"
        "            flag.touch()\n            time.sleep(3600)"
    )
    write_recipe(desk.folder, body)
    desk.wait_for_job(desk.submit("launch.hang_timeout_s=8.0"))
    first, second = desk.attempts()
    assert (first["kind"], second["outcome"]) == ("hang", "finished")
    assert "rank 2" in first["message"]
    log = desk.folder / "r/logs/attempt-0"
    assert "strange.py" in (log / "rank-2.log").read_text()
    assert all(
        "most recent call first" in (log / f"rank-{rank}.log").read_text() for rank in range(4)
    )
    last = [
        json.loads((log / f"rank-{rank}.collectives.json").read_text())["entries"][-1]
        for rank in range(4)
    ]
    assert {entry["process_group"][1] for entry in last} == {"default_pg"}
    slept = os.stat(log / "ended").st_mtime - os.stat(log / "rank-2.beat").st_mtime
    assert 8.0 <= slept < 16.0


def test_a_straggler_is_named_with_its_host(desk: Desk) -> None:
    """A rank whose forwards take five times the others': one line in the job's log, and the run goes on."""
    write_recipe(desk.folder, "        time.sleep(0.1 if os.environ['RANK'] == '2' else 0.02)")
    job = desk.submit("duration.steps=60")
    desk.wait_for_job(job)
    log = (desk.folder / f"r/logs/job-{job}.log").read_text()
    assert log.count("straggler: rank 2 on ") == 1
    assert "straggler: rank 1" not in log


def test_a_slow_node_is_left_out_after_the_pre_flight(desk: Desk) -> None:
    """All-reduces of one node take 0.3 s longer: it is named with its figures, and the run starts on others."""
    (desk.folder / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('SLURMD_NODENAME') == 'node1' and 'RANK' in os.environ:\n"
        "    import time\n    import torch.distributed as dist\n    real = dist.all_reduce\n"
        "    dist.all_reduce = lambda *a, **k: (time.sleep(0.3), real(*a, **k))[1]\n"
    )
    desk.site(setup=[f"export PYTHONPATH={desk.folder}:$PYTHONPATH"], slow_node_ratio=0.2)
    wide = [
        "batch.effective=16",
        "batch.per_device=2",
        "batch.gpus=8",
        "cluster.nodes={min: 1, max: 4}",
    ]
    job = desk.submit(*wide, "duration.steps=4", options=["--preflight"])
    desk.wait_for_job(job)
    (attempt,) = desk.attempts()
    assert "without node1, slow in the pre-flight" in attempt["cause"]
    assert "--nodelist=node0,node2" in attempt["command"]
    log = (desk.folder / f"r/logs/job-{job}.log").read_text()
    assert "node1: all-reduce within the node " in log
    report = json.loads((desk.folder / "r/preflight.json").read_text())
    assert [node["host"] for node in report["nodes"]] == ["node0", "node1", "node2", "node3"]


def test_the_other_launchers_through_srun(desk: Desk) -> None:
    """Accelerate and DeepSpeed, two nodes of two ranks: the losses and digests are torchrun's."""
    few = ["duration.steps=5", "schedule={name: constant}"]
    jobs = {
        launcher: desk.submit(*few, f"launch.launcher={launcher}", name=launcher)
        for launcher in ("accelerate", "deepspeed")
    }
    desk.drumline("run", "r.yaml", *few, "cluster.gpus_per_node=4", "--run-dir", "here")
    theirs = desk.numbers("here")
    for launcher, job in jobs.items():
        desk.wait_for_job(job)
        ours = desk.numbers(launcher)
        assert len(ours) == 5
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[3] == other[3]
            assert mine[1] == pytest.approx(other[1], rel=1e-6)


def test_a_sweep_is_one_array(desk: Desk) -> None:
    """Two tasks, two folders, one report; `logs -f` ends with the run that it follows."""
    write_recipe(desk.folder, "        pass")
    few = ["batch.gpus=2", "batch.per_device=6", "cluster.gpus_per_node=1", "duration.steps=5"]
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
    command = f"{sys.executable} -m toolkit.cli doctor --preflight --ratio 0.01 --json"
    desk.lab.ask("sbatch", "--wait", "--nodes=2", "--cpus-per-task=2", f"--chdir={desk.folder}", "--output=out.json",
                 "--error=err.txt", f"--export=ALL,PYTHONPATH={ROOT}", f"--wrap={command}")  # fmt: skip
    text = (desk.folder / "out.json").read_text()
    assert text, (desk.folder / "err.txt").read_text()
    first, second = json.loads(text)["nodes"]
    assert first["host"] != second["host"]
    assert min(first["between"], second["between"]) > 0  # each by its own slowest rank


def test_a_crash_loop_is_stopped(desk: Desk) -> None:
    """The same step fails twice: no progress, said in the job's log and in the record; nothing requeued."""
    body = "        assert self.seen < 12, 'planted crash'"
    write_recipe(desk.folder, body)
    job = desk.submit("checkpoint.every_steps=100")
    desk.wait_for_job(job, "FAILED")
    assert len(desk.attempts()) == 2
    assert "no progress since step" in desk.drumline("logs", "r").stdout
    assert "planted crash" in desk.attempts()[-1]["message"]
    assert desk.lab.job(job)["Restarts"] == "0"
    assert desk.lab.job(job)["ExitCode"] == "4:0"


def test_cancelled_it_has_saved_and_is_not_requeued(desk: Desk) -> None:
    """`drumline cancel`: exit 75 in the job, a checkpoint, and `resume` goes on from it without Slurm."""
    job = desk.submit("duration.steps=200")
    desk.wait_for_step(3)
    assert "asked to save and stop" in desk.drumline("cancel", "r").stdout
    desk.wait_for_job(job, "FAILED", "CANCELLED")
    (attempt,) = desk.attempts()
    assert attempt["outcome"] == "stopped"
    assert (desk.folder / f"r/checkpoints/step-{attempt['step']:08d}").is_dir()
    assert "nothing runs" in desk.drumline("cancel", "r", code=2).stderr


@pytest.mark.timeout(1200)
def test_ten_jobs_at_once_keep_apart(slurm: Lab, tmp_path: Path) -> None:
    """Submitted together, several on each node: ten folders, ten ids, ten trainings that are the same."""
    desk = Desk(slurm, tmp_path)
    desk.site(cpus_per_node=1)
    write_recipe(tmp_path, "        pass")
    few = ["batch.gpus=2", "batch.per_device=6", "cluster.gpus_per_node=1", "duration.steps=5"]
    command = [
        sys.executable,
        "-m",
        "toolkit.cli",
        "submit",
        "r.yaml",
        *few,
        "--site",
        "site.yaml",
        "--json",
    ]
    env = {**os.environ, **slurm.environment, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(10)]  # fmt: skip
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
    weights = {
        json.loads((Path(f["run"]) / "record.json").read_text())["weights"]["sha256"] for f in found
    }
    assert len(weights) == 1


def test_what_slurm_refuses_is_one_message_and_nothing_stays(
    slurm: Lab, desk: Desk, tmp_path: Path
) -> None:
    """Unknown partition, node or option, no sbatch, a controller that is down: exit 2, no folder, no job."""
    before = slurm.ask("squeue", "-h", "-o", "%A")
    for site, words in (
        ({"partition": "nowhere"}, "Invalid partition name specified. Nearest: sinfo lists"),
        ({"sbatch": ["--nodelist=node99"]}, "Invalid node name specified"),
        ({"sbatch": ["--no-such-option"]}, "unrecognized option '--no-such-option'"),
    ):
        desk.site(**site)
        message = desk.submit(code=2)
        assert words in message.splitlines()[-1], message
        assert not (tmp_path / "r").exists()
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
    others = desk.lab.ask("sbatch", "--parsable", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null",
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
    """On another file system: exit 2 in the job, no restart, and `status` says which node does not see it."""
    job = desk.submit("duration.steps=4", options=["--hold"])
    moved = desk.folder / "elsewhere"
    (desk.folder / "r").rename(moved)
    desk.lab.ask("scontrol", "release", job)
    desk.wait_for_job(job, "FAILED")
    assert desk.lab.job(job)["ExitCode"] == "2:0"
    assert not (desk.folder / "r").exists()
    status = desk.drumline("status", "elsewhere").stdout
    assert f"job {job}  FAILED (the run folder is not visible on node" in status


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
