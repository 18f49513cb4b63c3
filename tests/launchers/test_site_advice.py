"""What a site, a cluster or a launcher refuses with a "Nearest" is accepted when that is followed.

Slurm and Kubernetes are stood in for by programs that take every job; tests/cluster asks a real Slurm.
"""

import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from advice import (
    LM,
    ROOT,
    Row,
    change_record,
    command,
    command_in,
    heard,
    here,
    programs,
    refused,
    worked,
)
from conftest import tiny_recipe
from drumline.cluster.site import validate_site
from drumline.errors import LaunchError, RecipeError, RunFolderError
from drumline.recipe import yaml12
from drumline.recipe.load import load_recipe
from drumline.runs.folder import RunFolder
from drumline.runs.freeze import TOTAL_LIMIT
from drumline.session import members
from drumline.session.launch import refuse_what_cannot_start
from drumline.session.links import slow_words
from drumline.session.planning import make_plan
from drumline_launchers.skypilot import ACCELERATORS

__all__ = ["here", "programs"]

KUBERNETES = {"image": "i", "claim": "c"}
GPU = ["cluster.gpu=h100-80gb"]

Change = tuple[dict[str, Any], list[str]]
"""Keys of the site, and overrides of the recipe or options of `submit`; a later one replaces an earlier one."""

SITES: list[Row] = [
    Row("Slurm has no such partition. Nearest: batch, long", ({"partition": "nowhere"}, []),
        [({"partition": "batch"}, []), ({"partition": "long"}, [])]),
    Row("is over the 02:00:00 of partition batch", ({"time_limit": "3-00:00:00"}, []), [({"time_limit": "02:00:00"}, [])]),
    Row("time_limit: 8-00:00:00 is over the 7-00:00:00 of partition long", ({"time_limit": "8-00:00:00", "partition": "long"}, []),
        [({"time_limit": "7-00:00:00"}, [])]),
    Row("partition batch has 8. Nearest: fewer batch.gpus", ({}, ["batch.gpus=12", "batch.per_device=1", "cluster.gpus_per_node=1"]),
        [({}, ["batch.gpus=6"])]),
    Row("partition long allows 2. Nearest: fewer batch.gpus",
        ({"partition": "long"}, ["batch.gpus=4", "cluster.gpus_per_node=1"]), [({}, ["batch.gpus=2"])]),
    Row("are asked for, partition", ({}, ["batch.gpus=12", "batch.per_device=1", "cluster.gpus_per_node=1"]), [({}, ["batch.gpus=6"])]),
    Row("0 of 8 nodes of partition batch have what a node of the job needs", ({"cpus_per_node": 64}, []), [({"cpus_per_node": 8}, [])]),
    Row("nodes of partition batch have what a node of the job needs", ({"gpu_type": "a100"}, GPU), [({"gpu_type": "h100"}, [])]),
    Row("what a node of the job needs", ({"memory_per_node": "900G"}, []), [({"memory_per_node": "15G"}, [])]),
    Row("this user has lab. Nearest: lab", ({"account": "other"}, []), [({"account": "lab"}, [])]),
    Row("qos: other: account of this user has high, normal. Nearest: high", ({"qos": "other"}, []), [({"qos": "high"}, [])]),
    Row("secrets do not belong in a site. Nearest: name the variable", ({"setup": ["export HF_TOKEN=abc"]}, []),
        [({"setup": [], "environment": ["HF_TOKEN"]}, [])]),
    Row("are not before the end of time_limit 00:00:30 (30 s). Nearest: warning_s: 3", ({"time_limit": "00:00:30"}, []), [({"warning_s": 3}, [])]),
    Row("(2 s). Nearest: warning_s: 1", ({"time_limit": "00:00:02"}, []), [({"warning_s": 1}, [])]),
    Row("(1 s). Nearest: a longer time_limit", ({"time_limit": "00:00:01", "warning_s": 1}, []), [({"time_limit": "00:10:00"}, [])]),
    Row("--mail-… contradicts mail. Nearest: mail alone", ({"mail": {"user": "me"}, "sbatch": ["--mail-type=END"]}, []), [({"sbatch": []}, [])]),
    Row("Nearest: cluster.gpu=h100-80gb", ({"gpu": "h100-80gb"}, ["cluster.gpu=a100-80gb"]), [({}, ["cluster.gpu=h100-80gb"])]),
    Row("Nearest: cluster.gpus_per_node=2", ({"gpus_per_node": 2}, ["cluster.gpus_per_node=4"]), [({}, ["cluster.gpus_per_node=2"])]),
    Row("is not set here, so the job would not get it", ({"environment": ["NOT_SET"]}, []), [({"environment": []}, []), ({}, ["export"])]),
    Row("--hold is Slurm's. Nearest: --to slurm, or without it", ({"kubernetes": KUBERNETES}, ["--to=kubernetes", "--hold"]),
        [({}, ["--to=slurm"]), ({}, ["-", "--hold"])]),
    Row("--preflight: not with --to kubernetes", ({"kubernetes": KUBERNETES}, ["--to=kubernetes", "--preflight"]),
        [({}, ["--to=slurm"]), ({}, ["-", "--preflight"])]),
    Row("this run has no job in Slurm. Nearest: without --after", ({}, ["--after=finished-lm"]), [({}, ["-", "--after=finished-lm"])]),
    Row("Nearest: kubernetes: {image, claim}", ({}, ["--to=kubernetes"]), [({"kubernetes": KUBERNETES}, [])]),
    Row("no name for Kubernetes is in it", ({"kubernetes": KUBERNETES}, ["--to=kubernetes", "--run-dir=___"]), [({}, ["--run-dir=a"])]),
    Row("has no SkyPilot name that is known here", ({}, ["--to=skypilot", "--dry-run", "cluster.gpu=h20"]),
        [({}, [f"cluster.gpu={gpu}"]) for gpu in ACCELERATORS]),
]  # fmt: skip


def submit(name: str, changes: list[Change], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and messages of a `submit` with these changes, made one after the other."""
    site: dict[str, Any] = {"site": "lab"}
    words: dict[str, str] = {"--run-dir": f"--run-dir={name}"}
    for keys, more in changes:
        site |= keys
        if more[:1] == ["-"]:
            del words[more[1].partition("=")[0]]
        elif more == ["export"]:
            monkeypatch.setenv("NOT_SET", "1")
        else:
            words |= {word.partition("=")[0]: word for word in more}
    Path("s.yaml").write_text(yaml12.dump(site))
    done = command("submit", "r.yaml", *words.values(), "--site", "s.yaml")
    return done.code, done.err


@pytest.mark.parametrize("row", SITES, ids=lambda row: row.words)
def test_a_job_is_submitted_as_the_message_says(
    here: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """`submit` refuses the site or option; with what the message names in its place the job is submitted."""
    monkeypatch.setenv("HF_TOKEN", "hidden")
    Path("r.yaml").write_text(yaml12.dump(tiny_recipe()))
    code, told = submit("a", [row.wrong], monkeypatch)
    assert code == 2, told
    heard(row.words, told)
    for number, way in enumerate(row.ways):
        code, told = submit(f"b{number}", [row.wrong, way], monkeypatch)
        assert code == 0, told


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        ("account=a", {"account": "a"}), ("chdir=/x", {"runs": "/x"}), ("cpus-per-task=4", {"cpus_per_node": 4}),
        ("exclude=n1", {"exclude": ["n1"]}), ("export=A", {"environment": ["A"]}), ("gpus=8", {"gpus_per_node": 8}),
        ("gres=gpu:h100:8", {"gpu_type": "h100"}), ("mem=4G", {"memory_per_node": "4G"}), ("partition=p", {"partition": "p"}),
        ("qos=q", {"qos": "q"}), ("signal=USR1@60", {"warning_s": 60}), ("time=10", {"time_limit": "10"}),
        ("nodes=2", None), ("hold", None), ("array=0-3", None),
    ],
)  # fmt: skip
def test_an_option_of_sbatch_has_a_key(option: str, keys: dict[str, Any] | None) -> None:
    """The key of the site that is named takes the option's value; where none is named, the site does without."""
    with pytest.raises(RecipeError) as caught:
        validate_site({"site": "x", "sbatch": [f"--{option}"]}, "s")
    told = heard("contradicts what drumline writes", str(caught.value))
    named = told.partition("the site's key ")[2]
    assert named == "".join(keys or {}), told
    assert validate_site({"site": "x", **(keys or {})}, "s")


def test_slow_nodes_are_left_out_with_the_line_that_is_named() -> None:
    """The words in the message are a key of the site."""
    told = heard("below 0.8 of the others", slow_words({"n1": "1 GB/s", "rack-2": "2 GB/s"}, 0.8))
    line = told.partition("`")[2].partition("`")[0]
    assert validate_site({"site": "x", **yaml12.parse(line)}, "s").exclude == ["n1", "rack-2"]


@pytest.mark.parametrize("to", ["slurm", "kubernetes"])
def test_without_the_program_the_text_is_printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """`submit --dry-run` prints it; commands that have no --dry-run for it do not name it."""
    Path("s.yaml").write_text(yaml12.dump({"site": "x", "kubernetes": KUBERNETES}))
    monkeypatch.setenv("PATH", "/nowhere")
    told = refused("submit", "project/lm.yaml", "--to", to, "--site", "s.yaml")
    heard("is not on this machine's PATH", told)
    assert "or --dry-run" in told
    assert worked("submit", "project/lm.yaml", "--to", to, "--site", "s.yaml", "--dry-run").out
    for words in (("resume", "stopped-lm"), ("export", LM, "out")):
        if words[0] == "resume" or to == "slurm":
            told = refused(*words, "--to", to, "--site", "s.yaml")
            assert "Nearest: submit from a login node of the cluster" in told
            assert "--dry-run" not in told


def test_a_run_in_the_queue_is_cancelled_before_it_is_resumed(here: Path, programs: Path) -> None:
    """`drumline cancel`, then it is submitted again; or the job has ended by itself."""
    change_record(here / "stopped-lm", jobs=[{"target": "slurm", "id": "5", "submitted": "x"}])
    again = ("resume", "stopped-lm", "--to", "slurm")
    for end in (lambda: worked("cancel", "stopped-lm"), (programs / "queued").unlink):
        (programs / "queued").touch()
        heard("Nearest: drumline cancel first", refused(*again))
        end()
        worked(*again)
        change_record(here / "stopped-lm", jobs=[{"target": "slurm", "id": "5", "submitted": "x"}])


def test_an_export_of_a_run_that_never_started_names_status(here: Path, programs: Path) -> None:
    """The command that is named answers."""
    change_record(here / LM, attempts=[], outcome=None)
    told = refused("export", str(here / LM), "out", "--to", "slurm")
    heard("this run never started. Nearest: drumline status", told)
    assert worked(*command_in(told)).out.startswith("never started")


def test_the_site_of_a_run_that_this_user_did_not_submit(here: Path, programs: Path) -> None:
    """A site file of one's own, or --trust-code: the job is submitted."""
    for name in ("site.yaml", "mine.yaml"):
        Path("stopped-lm" if name == "site.yaml" else ".", name).write_text("site: x\n")
    again = ("resume", "stopped-lm", "--to", "slurm")
    heard("its site.yaml can name commands to run", refused(*again))
    worked(*again, "--trust-code")
    change_record(here / "stopped-lm", jobs=[])
    worked(*again, "--site", "mine.yaml")


def test_attend_outside_a_job_names_what_a_person_types(here: Path, programs: Path) -> None:
    """`submit` and `resume` of the run's recipe and of the run."""
    change_record(here / "stopped-lm", outcome="stopped", jobs=[])
    Path("stopped-lm/site.yaml").write_text("site: x\n")
    heard("attend without --nodes runs in a Slurm job only", refused("attend", "stopped-lm"))
    worked("submit", "stopped-lm", "--run-dir", "new")


def project(folder: Path) -> list[str]:
    """A recipe whose model is in a project of its own; the words of its `submit`."""
    folder.mkdir()
    shutil.copy(ROOT / "recipes/example_models.py", folder / "mine.py")
    recipe = tiny_recipe(project=".", model={"factory": "mine:mlp"})
    (folder / "r.yaml").write_text(yaml12.dump(recipe))
    (folder / "s.yaml").write_text(yaml12.dump({"site": "x", "kubernetes": KUBERNETES}))
    return ["submit", str(folder / "r.yaml"), "--site", str(folder / "s.yaml")]


def test_code_that_is_not_copied_is_copied_as_a_file(here: Path, programs: Path) -> None:
    """A link in the project's place of the factory's file: the file itself there is copied."""
    words = project(here / "p")
    (here / "p/mine.py").rename(here / "elsewhere.py")
    (here / "p/mine.py").symlink_to(here / "elsewhere.py")
    heard("put it into the project as a regular file", refused(*words))
    (here / "p/mine.py").unlink()
    (here / "elsewhere.py").rename(here / "p/mine.py")
    worked(*words)


def test_a_project_that_is_too_much_to_copy(here: Path, programs: Path) -> None:
    """A folder with the recipe and its code alone is copied."""
    words = project(here / "p")
    with (here / "p/large.py").open("wb") as file:
        file.truncate(TOTAL_LIMIT + 1)
    heard("Nearest: a folder for the recipe and its code alone", refused(*words))
    worked(*project(here / "alone"))


def test_what_a_config_map_cannot_hold(here: Path, programs: Path) -> None:
    """A file that is no text is put elsewhere; untracked files are committed or ignored."""
    words = [*project(here / "p"), "--to", "kubernetes"]
    (here / "p/table.bin").write_bytes(b"\xff")
    heard("is not text, and a ConfigMap holds text", refused(*words))
    (here / "p/table.bin").unlink()
    worked(*words)
    for name in ("a", "b"):
        (here / f"p/{name}.txt").write_text("some words and more of them\n" * 25_000)
    told = heard("a ConfigMap holds", refused(*words))
    assert "ignore" in told
    subprocess.run(["git", "init", "-q", str(here / "p")], check=True)
    (here / "p/.gitignore").write_text("*.txt\n")
    worked(*words)


def test_a_folder_of_another_run_is_told_to_a_pod(here: Path) -> None:
    """A pod that finds another run under its name: the run of another name begins."""
    source = here / "config"
    source.mkdir()
    other = {**yaml12.parse(Path("project/lm.yaml").read_text()), "seed": 99}
    (source / "recipe.yaml").write_text(yaml12.dump(other))
    shutil.copy("project/corpus.txt", source)
    with pytest.raises(RunFolderError) as caught:
        members.adopt(source, RunFolder(here / LM))
    heard("submit with another --run-dir", str(caught.value))
    members.adopt(source, RunFolder(here / "another"))
    assert (here / "another/record.json").is_file()


@pytest.mark.parametrize("stated", [[], ["cluster.nodes=2"], ["batch.effective=null", "batch.accumulation=2"]],
                         ids=["by gpus", "by nodes", "by accumulation"])  # fmt: skip
def test_a_plan_of_several_nodes_is_made_one_of_one(
    here: Path, stated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overrides that the message names, in whichever way the recipe says that it wants two nodes.

    The two GPUs of the node are made up.
    """
    monkeypatch.setattr("drumline.session.devices.gpus_here", lambda: 2)
    Path("r.yaml").write_text(yaml12.dump(tiny_recipe()))
    two = ["batch.gpus=4", "cluster.gpus_per_node=2", *GPU, *stated]
    with pytest.raises(LaunchError) as caught:
        refuse_what_cannot_start(make_plan(load_recipe("r.yaml", two)), False, False)
    told = heard("nodes, and `run` starts processes on one", str(caught.value))
    overrides = told.partition("Nearest: ")[2].partition(";")[0].split()
    refuse_what_cannot_start(make_plan(load_recipe("r.yaml", [*two, *overrides])), False, False)
    one = ("--dry-run", "--node-rank", "1", "--rendezvous", "node-0:29500")
    assert worked("run", "r.yaml", *two, *one).out


def test_a_node_rank_beyond_the_last_is_made_the_last(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stated or from the environment: the option that is named is accepted."""
    two = ["project/lm.yaml", "batch.gpus=2", "cluster.gpus_per_node=1", "--dry-run"]
    for options, variable in ((["--node-rank", "2"], "0"), ([], "7")):
        monkeypatch.setenv("NODE_RANK", variable)
        told = refused("run", *two, *options)
        heard("nodes, counted from 0. Nearest: --node-rank 1", told)
        worked("run", *two, *shlex.split(told.partition("Nearest: ")[2]))


def test_a_secret_in_a_recipe_is_left_to_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch, programs: Path
) -> None:
    """Without it, recipe and site are accepted."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", "envsecret-0123456789")
    words = ("submit", "project/lm.yaml")
    told = refused(*words, "description=envsecret-0123456789")
    heard("it holds a secret of this environment", told)
    worked(*words)


@pytest.mark.parametrize(("missing", "overrides", "way"), [
    ("accelerate", ["launch.launcher=accelerate"], True),
    ("deepspeed", ["launch.launcher=deepspeed"], True),
    ("deepspeed", ["launch.launcher=deepspeed", "strategy.name=zero2"], True),
    ("deepspeed", ["launch.launcher=deepspeed", "strategy={name: zero3, offload: optimizer}"], True),
    ("wandb", ["logging.wandb={project: p}"], False),
    ("tensorboard", ["logging.tensorboard=true"], False),
])  # fmt: skip
def test_what_is_not_installed_is_an_extra_or_done_without(
    here: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, missing: str, overrides: list[str], way: bool
) -> None:  # fmt: skip
    """The extra that is named installs the package; the launcher that is named instead is accepted."""
    from drumline.session import launch

    real = launch.find_spec
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == missing else real(name))
    told = refused("submit", "project/lm.yaml", *overrides)
    heard(" is not installed. Nearest: pip install 'drumline[", told)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"'drumline[{missing}]'" in told
    assert extras[missing][0].startswith(missing)
    if way:
        instead = told.partition(", or ")[2].strip().split()
        worked("submit", "project/lm.yaml", *overrides, *instead)
    monkeypatch.undo()
