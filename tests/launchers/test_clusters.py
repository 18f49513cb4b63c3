"""What is rendered for clusters: full texts, every size, hostile names, fields that nobody knows."""

import copy
import dataclasses
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from drumline.cluster.site import limit_seconds, load_site, validate_site
from drumline.errors import LaunchError, PlanError, RecipeError
from drumline.plan.model import Plan
from drumline.plan.resolve import resolve
from drumline.recipe import yaml12
from drumline.recipe.load import load_recipe
from drumline_launchers.base import Job
from drumline_launchers.kubernetes import check_manifests, render_manifests
from drumline_launchers.site import Site
from drumline_launchers.skypilot import ACCELERATORS, render_task
from drumline_launchers.slurm import Batch, render_script, step_command

GOLDEN = Path(__file__).parent / "golden"
FULL: dict[str, Any] = {
    "site": "big",
    "partition": "train",
    "account": "lab",
    "qos": "high",
    "gpu": "h100-80gb",
    "gpu_type": "h100",
    "gpus_per_node": 8,
    "cpus_per_node": 96,
    "memory_per_node": "1000G",
    "time_limit": "1-00:00:00",
    "warning_s": 180,
    "setup": ["module load cuda/12.8", "source /sw/venv/bin/activate"],
    "python": "/sw/venv/bin/python",
    "fabric": {"interface": "ib0", "infiniband": "mlx5"},
    "environment": ["WANDB_API_KEY"],
    "exclude": ["node-07", "node-09"],
    "cache": "/scratch/it's mine",
    "sbatch": ["--reservation=spring", "--comment=two words"],
    "mail": {"user": "me@example.org"},
    "kubernetes": {
        "image": "registry.example/train:1",
        "claim": "runs",
        "service_account": "trainer",
        "node_selector": {"pool": "h100"},
        "secrets": {"WANDB_API_KEY": {"name": "wandb", "key": "api-key"}},
    },
}
HOSTILE = [
    "a b",
    "it's",
    "x; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a\\b",
    'a"b',
    "-rf",
    "é",
    "a&b|c>d",
]


def site(**changes: Any) -> Site:
    return validate_site({**FULL, **changes}, "site")


def plan_of(nodes: int = 8) -> Plan:
    overrides = [
        f"batch.gpus={8 * nodes}",
        "batch.accumulation=null",
        "batch.effective=4096",
        "batch.per_device=1",
    ]
    return resolve(load_recipe("llama-8b-8xh100", overrides))


def batch(nodes: int = 8, run: str = "/shared/runs/a", **changes: Any) -> Batch:
    values = {
        "python": "/usr/bin/python3",
        "import_path": [Path("/sw/drumline")],
        "fewest": nodes,
        "most": nodes,
        **changes,
    }
    return Batch(run_folders=[Path(run)], **values)


def hold_golden(name: str, text: str, request: pytest.FixtureRequest) -> None:
    golden = GOLDEN / name
    if request.config.getoption("--rewrite-goldens"):
        golden.write_text(text)
    assert text == golden.read_text()


def hosts(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on this machine")
    done = subprocess.run(
        ["shellcheck", "--exclude=SC1091", "-"], input=script, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_whole_script(request: pytest.FixtureRequest) -> None:
    """Every line of it; shellcheck has nothing to say."""
    script = render_script(plan_of(), site(), batch())
    hold_golden("slurm-8-nodes.sh", script, request)
    shellcheck(script)


def test_a_site_that_says_nothing(request: pytest.FixtureRequest) -> None:
    """Only what the recipe needs."""
    script = render_script(plan_of(1), validate_site({"site": "plain"}, "s"), batch(1, after="17"))
    hold_golden("slurm-plain.sh", script, request)
    shellcheck(script)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_themselves(name: str, tmp_path: Path) -> None:
    """As run folder, cache and interpreter: a shell sees one word, and nothing is run."""
    script = render_script(plan_of(1), site(cache=name, python=name), batch(1, run=f"/r/{name}"))
    lines = script.splitlines()
    assert f"run={shlex.quote(f'/r/{name}')}" in lines
    assert f"export DRUMLINE_CACHE={shlex.quote(name)}" in lines
    values = "\n".join(line for line in lines if line.startswith(("run=", "export DRUMLINE_CACHE")))
    told = subprocess.run(["bash", "-c", f'{values}\nprintf "%s\\n%s" "$run" "$DRUMLINE_CACHE"'], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert told.stdout == f"/r/{name}\n{name}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"partition": "a b"}, {"partition": "a\n#SBATCH --uid=root"}, {"account": "$(id)"}, {"exclude": ["a;b"]},
     {"sbatch": ["--x\n--y"]}, {"sbatch": ["rm -rf"]}, {"time_limit": "soon"}, {"memory_per_node": "much"},
     {"setup": ["a\nb"]}, {"setup": ["a\0b"]}, {"setup": 5}, {"environment": ["A=1"]}],
)  # fmt: skip
def test_values_that_cannot_stand_in_a_script_are_refused(change: dict[str, Any]) -> None:
    """#SBATCH lines know no quotes: such a value is an error that names the key."""
    with pytest.raises(RecipeError, match=next(iter(change))):
        site(**change)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [(60, 3600), ("90:30", 5430), ("1:02:03", 3723), ("1-12", 129600), ("2-01:30", 178200), ("1-00:00:01", 86401),
     ("UNLIMITED", None), ("INFINITE", None)],
)  # fmt: skip
def test_every_form_of_a_limit_that_slurm_takes(limit: Any, seconds: int | None) -> None:
    """Also as YAML reads it; rendered as it was written; memory as a number of megabytes, or all of it."""
    made = site(time_limit=limit, memory_per_node=0)
    assert made.time_limit
    assert limit_seconds(made.time_limit) == seconds
    script = render_script(plan_of(1), made, batch(1))
    assert f"#SBATCH --time={limit}\n" in script
    assert "#SBATCH --mem=0\n" in script
    assert "#SBATCH --mem=64000\n" in render_script(
        plan_of(1), site(memory_per_node=64000), batch(1)
    )


def test_options_of_a_site_are_quoted_and_may_not_contradict() -> None:
    """A value of two words stays one; what the plan or another key says is refused with that key."""
    script = render_script(
        plan_of(1), site(sbatch=["--comment=two words", '--prefer="a b"', "--exclusive"]), batch(1)
    )
    assert '#SBATCH --comment="two words"\n#SBATCH --prefer="a b"\n#SBATCH --exclusive\n' in script
    for option, words in (
        ("--time=1:00", "the site's key time_limit"),
        ("--nodes=3", "leave it out: the plan says it"),
        ("--gres=gpu:4", "the site's key gpu_type"),
        ("--output=/x", "leave it out"),
        ("--partition=x", "the site's key partition"),
        ("--mail-type=END", "mail alone"),
    ):
        with pytest.raises(
            RecipeError, match=f"sbatch: {option.partition('=')[0]}.* contradicts .*{words}|{words}"
        ):
            site(sbatch=[option])


def test_values_that_clusters_really_have() -> None:
    """Lists of partitions, ranges of nodes, what NCCL takes; `~` is the submitter's home."""
    change = {"partition": "gpu,long", "exclude": ["node[01-03]"], "account": "abc@v100", "runs": "~/runs",
              "fabric": {"interface": "^lo,docker0", "infiniband": "mlx5_0:1,mlx5_1:1"}}  # fmt: skip
    made = site(**change)
    assert made.runs == str(Path.home() / "runs")
    assert made.exclude == ["node[01-03]"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setup": ["HF_TOKEN=abc; export HF_TOKEN"]}, "setup: HF_TOKEN: secrets do not belong"),
        ({"setup": ["declare -x WANDB_API_KEY=a"]}, "setup: WANDB_API_KEY: secrets"),
        ({"sbatch": ["--export=ALL,WANDB_API_KEY=a"]}, "sbatch: WANDB_API_KEY: secrets"),
        ({"time_limit": "00:02:00", "warning_s": 120}, r"time_limit 00:02:00 \(120 s\). Nearest: warning_s: 12"),
        ({"time_limit": "1:00", "warning_s": 61}, r"\(60 s\)"),
        ({"time_limit": "1-12", "warning_s": 129600}, r"\(129600 s\)"),
        ({"time_limit": "1-00:01", "warning_s": 86460}, r"\(86460 s\)"),
    ],
)  # fmt: skip
def test_secrets_and_limits_that_cannot_work(change: dict[str, Any], words: str) -> None:
    """However a shell sets a variable; a warning that comes with or after the end."""
    with pytest.raises(RecipeError, match=words):
        site(**change)


def test_the_fewest_nodes_of_a_range_are_planned_too(drumline: Any) -> None:
    """What does not fit on them is exit 3; nodes that would idle are told."""
    done = drumline("submit", "llama-70b-64xh100", "cluster.nodes={min: 1, max: 8}", "--dry-run")
    assert done.returncode == 3
    assert "on 1 of cluster.nodes 1 to 8: memory: " in done.stderr
    wide = ["batch.gpus=64", "batch.accumulation=null", "cluster.nodes={min: 5, max: 9}"]
    done = drumline("submit", "llama-8b-8xh100", *wide, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "given 5 nodes, 1 would idle: effective 256 can be split over 4" in done.stderr


@pytest.mark.parametrize(("name", "label"), [("My_Run.A", "my-run-a"), ("___", "")])
def test_names_that_kubernetes_allows(drumline: Any, tmp_path: Path, name: str, label: str) -> None:
    """A run folder's name in small letters; one without any letter is refused."""
    (tmp_path / "s.yaml").write_text(yaml12.dump(FULL))
    to = ["--to", "kubernetes", "--site", "s.yaml", "--run-dir", name, "--dry-run"]
    done = drumline("submit", "llama-8b-8xh100", *to)
    assert done.returncode == (0 if label else 2)
    assert f"name: {label}\n" in done.stdout if label else "no name for Kubernetes" in done.stderr


def test_a_site_file_is_checked_like_a_recipe(tmp_path: Path) -> None:
    """Unknown keys with the nearest, secrets by name, what is no mapping."""
    path = tmp_path / "s.yaml"
    for text, words in (
        ("site: a\npartion: x\n", "Did you mean 'partition'"),
        (
            "site: a\nsetup: ['export HF_TOKEN=abc']\n",
            "setup: HF_TOKEN: secrets do not belong in a site",
        ),
        ("- a\n", "a site is a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=words):
            load_site(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_site(tmp_path / "none.yaml")


@pytest.mark.parametrize("nodes", [1, 2, 16, 128, 512])
def test_every_size(nodes: int) -> None:
    """The script, the srun and the manifests name the same nodes and GPUs."""
    plan = plan_of(nodes)
    assert plan.batch.nodes == nodes
    script = render_script(plan, site(), batch(nodes))
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert "#SBATCH --gpus-per-node=h100:8\n" in script
    argv = step_command(
        plan,
        Job(Path("/r/plan-0.json"), Path("/r"), 0, "python", host="n0", port=1),
        site(),
        hosts(nodes + 1),
    ).argv
    assert argv[1:3] == [f"--nodes={nodes}", f"--ntasks={nodes}"]
    assert f"--nodelist={','.join(hosts(nodes))}" in argv
    _, job = render_manifests(plan, site(), "a", {})
    assert job["spec"]["trainer"]["numNodes"] == nodes
    assert render_task(plan, site(), Path("r.yaml"))["num_nodes"] == nodes


def test_an_array_of_runs(request: pytest.FixtureRequest) -> None:
    """One task for each run folder."""
    made = batch(1)
    several = Batch(**{**vars(made), "run_folders": [Path("/r/a b"), Path("/r/c")]})
    script = render_script(plan_of(1), site(), several)
    hold_golden("slurm-array.sh", script, request)
    shellcheck(script)
    line = "\n".join(script.splitlines()[script.splitlines().index("runs=(") :][:5])
    told = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=0\n{line}\nprintf %s "$run"'],
        capture_output=True,
        text=True,
    )
    assert told.stdout == "/r/a b"
    throttled = render_script(plan_of(1), site(), dataclasses.replace(several, at_most=1))
    assert "#SBATCH --array=0-1%1\n" in throttled
    assert "#SBATCH --array=0-1\n" in script


def test_every_key_of_a_site_matters() -> None:
    """Change any to another legal value, and some text changes."""
    others: dict[str, Any] = {
        "partition": "x", "account": "x", "qos": "x", "gpu_type": "x", "cpus_per_node": 5, "memory_per_node": "5G",
        "time_limit": "01:00:00", "warning_s": 5, "setup": ["x"], "python": "x", "fabric": {"interface": "x"},
        "container": {"kind": "pyxis", "image": "x"}, "environment": ["X"], "exclude": ["x"], "cache": "x", "sbatch": ["--x"],
        "mail": {"user": "x"},
        "kubernetes": {**FULL["kubernetes"], "namespace": "x"},
    }  # fmt: skip
    elsewhere = {
        "site": "its name",
        "gpu": "cli/submit.py",
        "gpus_per_node": "cli/submit.py",
        "runs": "cli/submit.py",
        "preflight": "cli/attend.py",
        "slow_node_ratio": "cli/attend.py",
        "gpu_hour_price": "cli/plan.py",
        "bandwidths": "cli/plan.py",
    }
    assert set(others) | set(elsewhere) == set(Site.model_fields)
    job = Job(Path("/r/plan-0.json"), Path("/r"), 0, "python", host="n0", port=1)

    def texts(place: Site) -> list[Any]:
        return [render_script(plan_of(2), place, batch(2)), step_command(plan_of(2), job, place, hosts(2)),
                render_manifests(plan_of(2), place, "a", {})]  # fmt: skip

    for key, value in others.items():
        assert texts(site(**{key: value})) != texts(site()), key


def test_a_range_of_nodes_is_asked_for() -> None:
    """Slurm's own syntax."""
    script = render_script(plan_of(4), site(), batch(fewest=1, most=4))
    assert "#SBATCH --nodes=1-4\n" in script
    assert (
        "--no-kill" not in script
    )  # a job whose first node is lost would hold the others and do nothing


@pytest.mark.parametrize(
    ("kind", "words"),
    [("apptainer", ["apptainer", "exec", "--nv", "--bind", "/data", "--bind", "/r", "image.sif", "/opt/python"]),
     ("pyxis", ["--container-image=image.sif", "--container-mounts=/data:/data,/r:/r", "/opt/python"])],
)  # fmt: skip
def test_containers(kind: str, words: list[str]) -> None:
    """The launcher of each node runs inside, with the run folder mounted."""
    place = site(
        container={"kind": kind, "image": "image.sif", "python": "/opt/python", "mounts": ["/data"]}
    )
    job = Job(Path("/r/plan-0.json"), Path("/r"), 0, "/usr/bin/python3", host="n0", port=1)
    argv = step_command(plan_of(2), job, place, hosts(2)).argv
    at = argv.index(words[0])
    assert argv[at : at + len(words)] == words
    assert argv[at + len(words) : at + len(words) + 3] == ["-P", "-m", "drumline_launchers.node"]


@pytest.mark.parametrize("kind", ["trainjob", "jobset", "job"])
def test_manifests_hold_to_the_models_and_to_the_golden(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """Full text; known to Kubeflow's models and, where these are Kubernetes' own, to its schema; secrets by name."""
    import kubernetes_validate

    place = site(kubernetes={**FULL["kubernetes"], "kind": kind})
    found = render_manifests(plan_of(2), place, "a", {"recipe.yaml": "recipe: a\n"})
    check_manifests(found)
    for manifest in found:
        if manifest["apiVersion"] in ("v1", "batch/v1"):
            kubernetes_validate.validate(
                manifest, kubernetes_validate.latest_version(), strict=True
            )
    text = "---\n".join(yaml12.dump(manifest) for manifest in found)
    hold_golden(f"kubernetes-{kind}.yaml", text, request)
    assert "secretKeyRef" in text


def _set(manifest: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        manifest = manifest[key]
    manifest[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [(["spec", "trainer", "numNode"], 3, "spec.trainer.numNode: unknown to Kubernetes"),
     (["spec", "trainer", "numNodes"], "two", "numNodes: Input should be a valid integer"),
     (["spec", "trainer", "command"], "python", "command: Input should be a valid list"),
     (["spec", "runtimePatches", 0, "manger"], "x", "spec.runtimePatches.0.manger: unknown"),
     (["metadata", "lables"], {}, "metadata.lables: unknown")],
)  # fmt: skip
def test_fields_that_nobody_knows_are_refused(path: list[Any], value: Any, words: str) -> None:
    """Kubeflow's models would drop them in silence."""
    manifests = copy.deepcopy(render_manifests(plan_of(2), site(), "a", {}))
    _set(manifests[1], path, value)
    with pytest.raises(LaunchError) as caught:
        check_manifests(manifests)
    assert words in str(caught.value)


def test_what_kubernetes_cannot_hold_is_told() -> None:
    """A site without the section, and a record too large for a ConfigMap."""
    with pytest.raises(PlanError, match="it has no `kubernetes` section"):
        render_manifests(plan_of(2), site(kubernetes=None), "a", {})
    with pytest.raises(PlanError, match="a ConfigMap holds"):
        render_manifests(plan_of(2), site(), "a", {"record.json": "x" * (1 << 20 | 1)})


def test_skypilots_names_are_of_rows_and_others_are_refused() -> None:
    """A card that SkyPilot is not known to offer, or that is stated by hand, is not guessed."""
    rows = yaml12.parse((ROOT / "toolkit/drumline/architectures/gpus.yaml").read_text())
    assert set(ACCELERATORS) < set(rows)
    assert render_task(plan_of(2), site(), Path("/r.yaml"))["resources"] == {
        "accelerators": "H100:8",
        "cpus": "96+",
    }
    plan = plan_of(2)
    cluster = plan.recipe.cluster.model_copy(update={"gpu": "h20"})
    other = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"cluster": cluster}))
    with pytest.raises(LaunchError, match="h20 has no SkyPilot name"):
        render_task(other, site(), Path("/r.yaml"))


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("kubernetes", ["--hold"], "--to kubernetes: --hold is Slurm's"),
        ("kubernetes", ["--chain", "2"], "--to kubernetes: --chain is Slurm's"),
        ("skypilot", ["--job-name", "x", "--dry-run"], "--to skypilot: --job-name is Slurm's"),
        ("slurm", ["--job-name", "$(id)"], "--job-name '$(id)': cannot stand in a job script"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    drumline: Any, to: str, options: list[str], words: str
) -> None:
    """Exit 2 before anything is read, instead of a job that is not what was asked for."""
    done = drumline("submit", "llama-8b-8xh100", "--to", to, *options)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_submit_dry_run_prints_the_text(drumline: Any, tmp_path: Path) -> None:
    """To stdout, and writes nothing; what is not offered is said."""
    (tmp_path / "s.yaml").write_text(yaml12.dump(FULL))
    for to, words in (
        ("slurm", "#SBATCH --nodes=1\n"),
        ("kubernetes", "kind: TrainJob"),
        ("skypilot", "num_nodes: 1"),
    ):
        done = drumline("submit", "llama-8b-8xh100", "--to", to, "--site", "s.yaml", "--dry-run")
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
    assert drumline("submit", "llama-8b-8xh100", "--to", "skypilot").returncode == 2
    assert drumline("submit", "llama-8b-8xh100", "--to", "pbs").returncode == 2
    done = drumline(
        "submit", "llama-8b-8xh100", "cluster.gpu=a100-80gb", "--site", "s.yaml", "--dry-run"
    )
    assert "the recipe says a100-80gb, site big has h100-80gb" in done.stderr
