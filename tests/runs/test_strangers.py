"""A run folder from a stranger: nothing of it is run, followed, passed on or believed without being asked for."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands_here import call, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_readers import READERS, RUNS, desk

from conftest import tiny_recipe
from drumline.checkpoint.files import encode, sha256
from drumline.checkpoint.manifest import MANIFEST
from drumline.checkpoint.state import TrainState
from drumline.metrics_file import parsed_line
from drumline.recipe import yaml12
from drumline.recipe.load import validate
from drumline.runs.code import read_code, restore_code
from drumline.runs.freeze import freeze_project
from drumline.runs.schema import why_no_record
from drumline.secrets import Secrets

__all__ = ["desk"]

EVIL = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n\n\ndef make(**config):\n    raise SystemExit(3)\n"


def change_record(run: Path, **changes: Any) -> None:
    path = run / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def evil(desk: Path) -> Path:
    """A stopped run whose plan and recipe name a function of a project beside it."""
    project = desk / "project"
    project.mkdir()
    (project / "evil.py").write_text(EVIL)
    recipe = validate(tiny_recipe(project=str(project), model={"factory": "evil:make"}), "r")
    plain = recipe.model_dump(by_alias=True)
    (desk / "r/recipe.yaml").write_text(yaml12.dump(plain))
    plan = json.loads((desk / "r/plan-0.json").read_text())
    (desk / "r/plan-0.json").write_text(json.dumps({**plan, "recipe": plain}))
    change_record(desk / "r", recipe=plain, recipe_sha256=None, outcome="stopped")
    return project


@pytest.mark.parametrize("words", [("export", "r", "out"), ("resume", "r"), ("run", "r"), ("run", "r/recipe.yaml"),
                                   ("verify", "r"), ("prepare", "r"), ("plan", "r", "--trace"),
                                   ("reproduce", "r"), ("sweep", "r", "optimizer.lr=1e-3,1e-4")],
                         ids=lambda words: " ".join(words))  # fmt: skip
def test_the_code_of_a_strangers_run_is_not_run_unasked(
    desk: Path, evil: Path, words: tuple[str, ...]
) -> None:
    """Every command that would run it names the function and the option; asked for, it does run."""
    done = call(desk, *words)
    assert done.code == 2, done
    assert "evil:make" in done.err
    assert "--trust-code" in done.err
    assert not (evil / "executed").exists()
    if words[0] in ("export", "verify", "plan"):
        trusted = call(desk, *words, "--trust-code", limit_s=120)
        assert (evil / "executed").exists() or "prepare" in trusted.err, trusted
    for command in ("plan", "doctor", "status", "compare", "report"):
        call(desk, *READERS[command])
        assert not (evil / "executed").exists() or words[0] in ("export", "verify", "plan")


def test_a_project_that_this_user_has_trained_is_trusted(desk: Path, evil: Path) -> None:
    """A recipe of one's own is asked for nothing, and neither are the runs of its project afterwards."""
    (desk / "own.yaml").write_text((desk / "r/recipe.yaml").read_text())
    call(desk, "prepare", "own.yaml")
    done = call(desk, "plan", "r", "--trace")
    assert (evil / "executed").exists(), done


GIT_TRAPS = {
    "fsmonitor": ("core.fsmonitor", "{trap}"),
    "clean filter": ("filter.evil.clean", "{trap}"),
    "filter process": ("filter.e.v il.process", "{trap}"),
    "external diff": ("diff.external", "{trap}"),
    "textconv": ("diff.evil.textconv", "{trap}"),
    "diff command": ("diff.evil.command", "{trap}"),
    "hooks": ("core.hooksPath", "{hooks}"),
    "pager": ("core.pager", "{trap}"),
    "smudge filter": ("filter.evil.smudge", "{trap}"),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a changed file that has attributes, and every hook that git knows here."""
    folder = tmp_path / "repository"
    folder.mkdir()
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\ncat\n")
    trap.chmod(0o755)
    (tmp_path / "hooks").mkdir()
    for name in (
        "post-checkout",
        "pre-commit",
        "post-index-change",
        "reference-transaction",
        "pre-auto-gc",
    ):
        shutil.copy(trap, tmp_path / "hooks" / name)

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)  # fmt: skip

    git("init", "-q")
    (folder / "m.py").write_text("def make(**config):\n    return config\n")
    git("add", ".")
    git("commit", "-qm", "one")
    (folder / ".gitattributes").write_text('*.py filter=evil diff=evil\n*.txt filter="e.v il"\n')
    (folder / "m.py").write_text("def make(**config):\n    return dict(config)\n")
    (folder / "n.txt").write_text("new\n")
    return folder


@pytest.mark.parametrize("trap", GIT_TRAPS)
@pytest.mark.parametrize("through", ["configuration", "environment"])
def test_git_runs_nothing_that_a_repository_names(
    repository: Path, tmp_path: Path, trap: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the code of a repository, and restoring it: the same diff, and no program is started."""
    key, value = GIT_TRAPS[trap]
    value = value.format(trap=tmp_path / "trap", hooks=tmp_path / "hooks")
    if through == "configuration":
        subprocess.run(["git", "-C", str(repository), "config", key, value], check=True)
    else:
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", key)
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", value)
        monkeypatch.setenv("GIT_EXTERNAL_DIFF", value)
    recipe = validate(tiny_recipe(project=str(repository), model={"factory": "m:make"}), "r")
    code = read_code(recipe, repository, Secrets({}))
    assert "return dict(config)" in code["diff"]
    assert set(code["untracked"]) == {".gitattributes", "n.txt"}
    restored = restore_code(code, repository, tmp_path / "restored")
    assert "dict(config)" in (restored / "m.py").read_text()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("job", [
    {"target": "slurm", "id": "--user=root"},
    {"target": "slurm", "id": "1;rm"},
    {"target": "slurm", "id": "../../x"},
    {"target": "slurm", "id": ["1"]},
    {"target": "kubernetes", "id": "namespace/prod", "namespace": "default"},
    {"target": "kubernetes", "id": "job/a", "namespace": "--all-namespaces"},
    {"target": "kubernetes", "id": "job/--all", "namespace": "default"},
    {"target": "elsewhere", "id": "1"},
    "1",
])  # fmt: skip
def test_a_job_id_that_is_none_goes_nowhere(
    desk: Path, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the key, before scancel or kubectl is called."""
    calls = desk.parent / "calls"
    (desk.parent / "bin").mkdir()
    for name in ("scancel", "scontrol", "sacct", "kubectl"):
        (desk.parent / "bin" / name).write_text(f'#!/bin/sh\necho "$0 $@" >> {calls}\n')
        (desk.parent / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{desk.parent}/bin:{os.environ['PATH']}")
    change_record(desk / "r", jobs=[job])
    for command in ("cancel", "status"):
        done = call(desk, command, "r")
        assert done.code == 4, done
        assert "it is not a record of drumline: jobs.0" in done.err
    assert not calls.exists()


KEYS = ["record_version", "recipe", "recipe_sha256", "training_sha256", "plan", "data", "code", "versions",
        "hardware", "container", "command", "parent", "created", "attempts", "restarts", "outcome", "weights",
        "jobs", "reproduced", "begun_anew"]  # fmt: skip
WRONG = st.sampled_from([-1, 1.5, "x", True, [1], {"a": 1}, [{"a": None}], [None], "2026-99-99", {"recipe": 3},
                         float("nan"), "\x1b[31mred", {"total": "x"}, {"commit": 1}])  # fmt: skip


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(KEYS), inner=st.booleans(), value=WRONG)
def test_a_record_of_other_types_is_told_by_path_and_key(
    desk: Path, key: str, inner: bool, value: Any
) -> None:
    """No command shows a traceback; one bad record among others is left out of `runs`, and said."""
    good = json.loads((desk / "r/record.json").read_text())
    shutil.copytree(desk / "r", desk / "good", dirs_exist_ok=True)
    changed = json.loads(json.dumps(good))
    if inner and isinstance(changed.get(key), dict) and changed[key]:
        changed[key][sorted(changed[key])[0]] = value
    elif inner and key == "attempts":
        changed[key][0][sorted(changed[key][0])[0]] = value
    else:
        changed[key] = value
    (desk / "r/record.json").write_text(json.dumps(changed))
    try:
        for command in ("status", "runs", "doctor", "compare", "report"):
            done = call(desk, *READERS[command])
            assert done.code in (0, 2, 4, 5), (command, done)
            assert "Traceback" not in done.err, (command, done.err)
            assert "\x1b" not in done.out + done.err
            if command == "status" and "NaN" in (desk / "r/record.json").read_text():
                assert "record.json: cannot be read: NaN is not JSON" in done.err
            elif command == "status" and why_no_record(changed):
                assert f"record.json: it is not a record of drumline: {key}" in done.err
            if command == "runs":
                assert "good" in done.out
                text = (desk / "r/record.json").read_text()
                assert ("left out" in done.err) is bool(why_no_record(changed) or "NaN" in text)
    finally:
        (desk / "r/record.json").write_text(json.dumps(good))


def test_replaced_weights_are_found_though_all_digests_agree(desk: Path) -> None:
    """The weights of a finished run are compared with its record, by doctor and export."""
    path = desk / "r/checkpoints/step-00000012"
    shard, told = path / "rank-0.safetensors", path / "rank-0.json"
    raw = bytearray(shard.read_bytes())
    described = json.loads(told.read_bytes())
    name = next(name for name in described["tensors"] if name.startswith("model."))
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    raw[8 + size + begin : 8 + size + begin + 2] = b"\x00\x42"
    shard.write_bytes(bytes(raw))
    described["tensors"][name]["sha256"] = sha256(bytes(raw[8 + size + begin : 8 + size + end]))
    described.pop("weight_sums", None)
    told.write_bytes(encode(described))
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest.pop("sha256")
    manifest["files"]["rank-0.json"] = sha256(told.read_bytes())
    (path / MANIFEST).write_bytes(encode({**manifest, "sha256": sha256(encode(manifest))}))
    health = json.loads(call(desk, "doctor", "r", "--json").out)
    assert "its weights are not those that record.json names" in health["bad"]["step-00000012"]
    done = call(desk, "export", "r", "../exported")
    assert done.code == 4
    assert "its weights are not those that record.json names (weights.sha256)" in done.err
    assert not (desk.parent / "exported").exists()


def test_doctor_never_advises_to_delete_what_holds_checkpoints(desk: Path) -> None:
    """A folder without a record, or with one that is a pipe: put it back."""
    (desk / "r/record.json").unlink()
    told = call(desk, "doctor", "r")
    assert "next         put record.json back" in told.out
    os.mkfifo(desk / "r/record.json")
    told = call(desk, "doctor", "r")
    assert "rm -r" not in told.out + told.err


def test_few_descriptors_and_an_odd_name_end_in_one_message(desk: Path) -> None:
    """Twenty descriptors; a run folder whose name is not UTF-8, or too long: no traceback, nothing changes."""
    before = snapshot(desk)
    for command in ("status", "doctor", "export", "runs", "report"):
        done = call(desk, *READERS[command], descriptors=20)
        assert "Traceback" not in done.err, (command, done)
        assert done.code in (0, 2, 4), (command, done)
    assert snapshot(desk) == before
    (desk / "own.yaml").write_text(yaml12.dump(tiny_recipe()))
    for name in (os.fsdecode(b"r\xff"), "x" * 250):
        done = call(desk, "run", "own.yaml", "--run-dir", name)
        assert done.code == 2, done
        assert done.err.startswith("drumline: --run-dir")
    shutil.move(desk / "r", desk / os.fsdecode(b"r\xff"))
    for command in ("status", "doctor", "plan", "runs"):
        words = [os.fsdecode(b"r\xff") if word == "r" else word for word in READERS[command]]
        done = call(desk, *words)
        assert "Traceback" not in done.err, (command, done)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_lines_and_comments_are_left_out_and_counted(
    desk: Path, data: st.DataObject
) -> None:
    """Any value of any field of metrics.jsonl and of recipe.yaml's comments: no traceback; doctor counts them."""
    metrics, recipe = desk / "r/metrics.jsonl", desk / "r/recipe.yaml"
    before = metrics.read_text(), recipe.read_text()
    lines = before[0].splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    line = json.loads(lines[number])
    line[data.draw(st.sampled_from(sorted(line)))] = data.draw(WRONG)
    changed = data.draw(st.sampled_from([json.dumps(line), "[]", "x", '{"step": 3', "null", "{}"]))
    metrics.write_text("\n".join([*lines[:number], changed, *lines[number + 1 :]]) + "\n")
    comment = data.draw(st.sampled_from(["# x", "#", "# drumline: {", "# {}", "# record: []"]))
    texts = before[1].splitlines()
    place = data.draw(st.integers(0, len(texts)))
    recipe.write_text("\n".join([*texts[:place], comment, *texts[place:]]) + "\n")
    try:
        for command in ("status", "runs", "doctor", "compare", "report", "logs"):
            done = call(desk, *READERS[command])
            assert done.code in (0, 2, 4, 5), (command, done)
            assert "Traceback" not in done.err, (command, done.err)
            if command == "doctor" and parsed_line(changed.encode()) is None:
                assert "metrics.jsonl: 1 lines are no metrics and are left out" in done.out
        done = call(desk, "compare", "r/recipe.yaml", "r")
        assert "Traceback" not in done.err, done.err
    finally:
        metrics.write_text(before[0])
        recipe.write_text(before[1])


STATE = st.sampled_from(sorted(TrainState.__dataclass_fields__))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(field=STATE, value=WRONG)
def test_a_checkpoint_of_other_types_is_damaged(desk: Path, field: str, value: Any) -> None:
    """A state whose digests agree and whose types do not: told as damage, with the field, or read."""
    path = desk / "r/checkpoints/step-00000012"
    before = {name: (path / name).read_bytes() for name in ("state.json", MANIFEST)}
    state = {**json.loads(before["state.json"]), field: value}
    raw = json.dumps(
        state, separators=(",", ":")
    ).encode()  # with NaN, which drumline does not write
    (path / "state.json").write_bytes(raw)
    manifest = json.loads(before[MANIFEST])
    manifest.pop("sha256")
    manifest["files"]["state.json"] = sha256(raw)
    (path / MANIFEST).write_bytes(encode({**manifest, "sha256": sha256(encode(manifest))}))
    try:
        for command in ("doctor", "compare"):
            done = call(desk, *READERS[command])
            assert "Traceback" not in done.err, (command, done.err)
            assert done.code in (0, 2, 4, 5)
    finally:
        for name, raw in before.items():
            (path / name).write_bytes(raw)


def test_code_without_a_project_and_without_a_record_is_asked_for_too(
    desk: Path, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """project: null means the current folder, which may be the run's own; a record that is a dangling link is one."""
    run = desk / "r"
    shutil.copy(evil / "evil.py", run / "evil.py")
    for name in ("recipe.yaml", "plan-0.json", "record.json"):
        text = (run / name).read_text().replace(f'"{evil}"', "null").replace(str(evil), "null")
        (run / name).write_text(text)
    for words in (("export", ".", "../out"), ("verify", "."), ("plan", ".", "--trace"), ("resume", "."),
                  ("attend", ".", "--nodes", "1")):  # fmt: skip
        done = call(run, *words)
        assert done.code == 2, done
        assert "evil:make in the current folder" in done.err
    (run / "record.json").unlink()
    (run / "record.json").symlink_to("/nonexistent")
    assert call(run, "run", "recipe.yaml", "--run-dir", "../new").code == 2
    assert not (run / "executed").exists()


def test_a_site_in_a_strangers_run_is_not_submitted_unasked(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its set-up lines are commands: `resume --to` and `export --to` ask, and manifests are rendered anew."""
    change_record(desk / "r", outcome="stopped", weights=None,
                  jobs=[{"target": "kubernetes", "id": "job/a", "namespace": "default"}])  # fmt: skip
    (desk / "r/site.yaml").write_text("site: x\nsetup: ['touch /pwned']\n")
    (desk / "r/manifests.yaml").write_text("kind: Namespace\n")
    calls = desk.parent / "calls"
    (desk.parent / "bin").mkdir()
    for name in ("sbatch", "kubectl"):
        (desk.parent / "bin" / name).write_text(
            f'#!/bin/sh\necho "$0 $@" >> {calls}\ncat >> {calls}\n'
        )
        (desk.parent / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{desk.parent}/bin:{os.environ['PATH']}")
    (desk / "r/recipe.yaml").write_text(
        (desk / "r/recipe.yaml").read_text().replace("@FOLDER@", str(RUNS))
    )
    for name in ("plan-0.json", "record.json"):
        (desk / "r" / name).write_text(
            (desk / "r" / name).read_text().replace("@FOLDER@", str(RUNS))
        )
    call(desk, "prepare", "r")
    for words in (("export", "r", "out", "--to", "slurm"), ("resume", "r", "--to", "slurm"),
                  ("resume", "r", "--to", "kubernetes")):  # fmt: skip
        done = call(desk, *words)
        assert done.code == 2, done
        assert "its site.yaml can name commands to run" in done.err, done
    assert not calls.exists() or "Namespace" not in calls.read_text()
    assert not calls.exists() or "sbatch" not in calls.read_text()


def test_what_a_job_s_option_does_not_do_here_is_said(desk: Path) -> None:
    """`resume` and `export` on this machine refuse a cluster's options instead of ignoring them."""
    change_record(desk / "r", outcome="stopped", weights=None)
    (desk / "s.yaml").write_text("site: x\n")
    for words, named in ((("resume", "r", "--time", "5"), "--time"), (("resume", "r", "--hold"), "--hold"),
                         (("resume", "r", "--site", "s.yaml"), "--site"),
                         (("export", "r", "out", "--site", "s.yaml"), "--site")):  # fmt: skip
        done = call(desk, *words)
        assert (done.code, f"{named}: " in done.err, "Nearest: --to slurm" in done.err) == (
            2,
            True,
            True,
        )


def test_git_and_its_usual_filters_work(repository: Path, tmp_path: Path) -> None:
    """What `git lfs install` sets is no odd name; a repository that is another's, by a file or a link, is not read."""
    for key, value in (("clean", "git-lfs clean -- %f"), ("smudge", "git-lfs smudge"), ("process", "git-lfs filter-process"),
                       ("required", "true")):  # fmt: skip
        subprocess.run(
            ["git", "-C", str(repository), "config", f"filter.lfs.{key}", value], check=True
        )
    recipe = validate(tiny_recipe(project=str(repository), model={"factory": "m:make"}), "r")
    assert "dict(config)" in read_code(recipe, repository, Secrets({}))["diff"]
    for kind in ("file", "link"):
        strange = tmp_path / kind
        strange.mkdir()
        (strange / "m.py").write_text("def make(**config):\n    return 5\n")
        if kind == "file":
            (strange / ".git").write_text(f"gitdir: {repository}/.git\n")
        else:
            (strange / ".git").symlink_to(repository / ".git")
        other = validate(tiny_recipe(project=str(strange), model={"factory": "m:make"}), "r")
        code = read_code(other, strange, Secrets({}))
        assert (code["commit"], code["diff"]) == (None, "")
        assert set(code["untracked"]) == {"m.py"}
    worktree = tmp_path / "worktree"
    subprocess.run(
        ["git", "-C", str(repository), "worktree", "add", "-q", str(worktree)], check=True
    )
    own = validate(tiny_recipe(project=str(worktree), model={"factory": "m:make"}), "r")
    assert read_code(own, worktree, Secrets({}))["commit"]


@pytest.mark.parametrize("trap", ["submodule", "lazy fetch"])
def test_git_runs_nothing_of_submodules_and_missing_blobs(
    repository: Path, tmp_path: Path, trap: str
) -> None:
    """A submodule's own diff command; the program of a remote from which a clone would fetch what it lacks."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b", "-c",
                               "protocol.file.allow=always", *words], check=True, capture_output=True, text=True)  # fmt: skip
        return done.stdout.strip()

    if trap == "submodule":
        inner = tmp_path / "inner"
        shutil.copytree(repository, inner)
        git("submodule", "add", "-q", str(inner), "sub")
        git("commit", "-qm", "sub")
        (repository / "sub/m.py").write_text("changed = 1\n")
        (repository / "sub/.gitattributes").write_text("*.py diff=evil\n")
        for words in (
            ["config", "diff.evil.command", str(tmp_path / "trap")],
            ["commit", "-qam", "two"],
        ):
            subprocess.run(["git", "-C", str(repository / "sub"), "-c", "user.name=a", "-c", "user.email=a@b", *words],
                           check=True)  # fmt: skip
        git("config", "diff.submodule", "diff")
    else:
        blob = git("rev-parse", "HEAD:m.py")
        (repository / ".git/objects" / blob[:2] / blob[2:]).unlink()
        for key, value in (("core.repositoryformatversion", "1"), ("extensions.partialClone", "origin"),
                           ("remote.origin.promisor", "true"), ("remote.origin.url", str(tmp_path)),
                           ("remote.origin.uploadpack", str(tmp_path / "trap")), ("protocol.file.allow", "always")):  # fmt: skip
            git("config", key, value)
    recipe = validate(tiny_recipe(project=str(repository), model={"factory": "m:make"}), "r")
    read_code(recipe, repository, Secrets({}))
    assert not (tmp_path / "sprung").exists()


def test_a_copy_of_the_code_follows_no_link_and_takes_no_secret(tmp_path: Path) -> None:
    """A folder that is a link, a file that holds a token: left out, with the reason."""
    project = tmp_path / "project"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/notes.txt").write_text("private")
    (project / "conf").mkdir(parents=True)
    (project / "conf/notes.txt").write_text("mine")
    (project / "m.py").write_text("def make():\n    pass\n")
    (project / "settings.py").write_text('API_TOKEN = "abcd1234efgh5678ijkl"\n')
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(project), *words], check=True)
    shutil.rmtree(project / "conf")
    (project / "conf").symlink_to(tmp_path / "outside")
    frozen = freeze_project(project, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").rglob("*")] == ["m.py"]
    left_out = dict(frozen.left_out)
    assert left_out.pop("conf", "").startswith("a symbolic link")  # which git lists as a new file
    assert left_out == {
        "conf/notes.txt": "a symbolic link, or in a folder that is one",
        "settings.py": "holds a secret",
    }


def test_logs_read_regular_files_only_and_a_sweep_only_its_own_runs(desk: Path) -> None:
    """Links, pipes and odd names among the logs; a sweep whose run is a link to another."""
    logs = desk / "r/logs/attempt-0"
    logs.mkdir(parents=True, exist_ok=True)
    (desk / "private.txt").write_text("private")
    (logs / "rank-0.log").unlink(missing_ok=True)
    (logs / "rank-0.log").symlink_to(desk / "private.txt")
    (logs / "launcher.log").unlink(missing_ok=True)
    os.mkfifo(logs / "launcher.log")
    os.mkfifo(desk / "r/logs/job-5.log")
    (desk / "r/logs/attempt-²").mkdir()
    (desk / "r/logs/job-6.log").write_text("\x1b[31mred")
    done = call(desk, "logs", "r", limit_s=20)
    assert done.code == 0, done
    assert "private" not in done.out
    assert "\x1b" not in done.out
    (desk / "all").mkdir()
    (desk / "all/sweep.json").write_text('{"0": []}')
    (desk / "all/0").symlink_to(desk / "r")
    for command in ("status", "cancel", "logs"):
        done = call(desk, command, "all")
        assert done.code == 2, done
        assert "all/0: is a symbolic link" in done.err


def test_hard_links_are_not_written_through(desk: Path) -> None:
    """A page's temporary name, and the lock, that are links to another file: that file stays as it is."""
    (desk / "mine.txt").write_text("mine")
    for name in (".report.html.part", ".lock"):
        (desk / "r" / name).unlink(missing_ok=True)
        os.link(desk / "mine.txt", desk / "r" / name)
    change_record(desk / "r", outcome="stopped", weights=None)
    assert call(desk, "report", "r").code == 0
    assert "has a hard link elsewhere" in call(desk, "resume", "r").err
    assert (desk / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("line", [
    {"step": 13, "kind": "step"}, {"step": 13, "kind": "step", "loss": 10**400, "lr": 1.0, "digest": "a"},
    {"step": 13, "kind": "step", "loss": 1.0, "lr": 1.0, "digest": "a", "seconds": 10**400},
    {"step": 13, "kind": "event", "checkpoint/saved": "x"}, {"step": 10**400, "kind": "event"},
], ids=str)  # fmt: skip
def test_lines_with_impossible_numbers_are_left_out(desk: Path, line: dict[str, Any]) -> None:
    """Every reader goes on without them."""
    with (desk / "r/metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for command in ("status", "runs", "doctor", "compare", "report"):
        done = call(desk, *READERS[command])
        assert done.code == 0, (command, done)


ENTRY = {
    "start": [None, 10**15, -1, "x"],
    "boxes": [
        None,
        "x",
        [],
        [[[0], [10**15]]],
        [[[-1], [1]]],
        [[["x"], [1]]],
        [[[0] * 99, [1] * 99]],
    ],
    "dtype": ["foo", 3],
    "shape": [[10**9, 10**9], "x", None],
    "bytes": [-8, "x"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ENTRY.items() for value in values]
)
def test_entries_that_do_not_go_together_are_damage(desk: Path, key: str, value: Any) -> None:
    """A rank's manifest with refitted digests: doctor does not call it sound, and no command fails otherwise."""
    path = desk / "r/checkpoints/step-00000012"
    described = json.loads((path / "rank-0.json").read_bytes())
    name = next(name for name in described["tensors"] if name.startswith("model."))
    described["tensors"][name][key] = value
    (path / "rank-0.json").write_bytes(encode(described))
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest.pop("sha256")
    manifest["files"]["rank-0.json"] = sha256(encode(described))
    (path / MANIFEST).write_bytes(encode({**manifest, "sha256": sha256(encode(manifest))}))
    health = json.loads(call(desk, "doctor", "r", "--json").out)
    assert "step-00000012" in health["bad"], health
    for words in (("export", "r", "../out"), ("compare", "r/checkpoints/step-00000012", "r")):
        done = call(desk, *words)
        assert done.code in (2, 4), done
        assert "Traceback" not in done.err
