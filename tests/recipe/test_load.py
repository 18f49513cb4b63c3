"""Files, extends, overrides, and messages with path, value and nearest fix."""

import glob
import math
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.data.files import matching_files
from drumline.errors import DataError, RecipeError
from drumline.recipe import catalogue, yaml12
from drumline.recipe.load import load_recipe, merge, override, validate


def write(path: Path, value: Any) -> str:
    path.write_text(yaml12.dump(value))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimzer": {}}, r"optimzer: unknown key. Did you mean 'optimizer'\?"),
        ({"batch": {"per_devise": 3}}, r"batch.per_devise: unknown key. Did you mean 'per_device'\?"),
        ({"optimizer": {"lr_scaling": {"rul": "x"}}}, r"lr_scaling.rul: .*Did you mean 'rule'"),
        ({"batch": {"per_device": 0}}, r"batch.per_device: 0: input should be greater than or equal"),
        ({"batch": {"per_device": 2.0}}, r"batch.per_device: 2.0 is not a whole number. Nearest: 2"),
        ({"duration": {"steps": 1e5}}, r"duration.steps: 100000.0 is not a whole number. Nearest: 100000"),
        ({"optimizer": None}, r"optimizer: is empty. Nearest: leave the section out, or give it a key"),
        ({"launch": {"hang_factor": math.inf}}, r"launch.hang_factor: inf is not a finite number"),
        ({"model": {"config": {"x": [math.nan]}}}, r"model.config.x\[0\]: nan is not a finite number"),
        ({"description": "a\0b"}, r"description: .* holds a NUL character"),
        ({"batch": {"per_device": "4"}}, r"batch.per_device: '4': input should be a valid integer"),
        ({"optimizer": {"lr": True}}, r"optimizer.lr: True"),
        ({"optimizer": {"name": "adamW"}}, r"optimizer.name: 'adamW' .* Did you mean 'adamw'\?"),
        ({"strategy": {"name": "tensor_parallel"}}, r"'tensor_parallel'.*not offered. Nearest: fsdp"),
        ({"duration": {"epochs": 1}}, r"duration: exactly one of steps, epochs, tokens; given: steps, epochs"),
        ({"schema": 2}, r"schema: 2: input should be less than or equal to 1"),
        ({"recipe": "No Spaces"}, r"recipe: 'No Spaces'"),
        ({"recipe": "../up"}, r"recipe: '../up'"),
        ({"model": {"factory": None}}, r"model: source factory needs factory"),
        ({"model": {"architecture": "llama"}}, r"model: source factory does not take architecture"),
        ({"model": {"factory": "os.path:join"}}, r"model.factory: 'os.path:join'"),
        ({"early_stopping": {}}, r"early_stopping needs an evaluation section"),
        ({"schedule": {"power": 2.0}}, r"schedule: power belongs to schedule polynomial, not constant"),
        ({"optimizer": {"momentum": 0.9}}, r"optimizer: momentum has no meaning for adamw"),
        ({"cluster": {"nodes": {"min": 4, "max": 2}}}, r"cluster.nodes: min 4 is above max 2"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_path(change: dict[str, Any], message: str) -> None:
    """Unknown keys, wrong types and impossible combinations are refused where they stand."""
    with pytest.raises(RecipeError, match=message):
        validate(tiny_recipe(**change), "r.yaml")


def test_all_mistakes_are_told_at_once() -> None:
    """Two mistakes make two lines, each with the file."""
    with pytest.raises(RecipeError) as caught:
        validate(tiny_recipe(seed=-1, precision="fp8"), "r.yaml")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["r.yaml"] * 2


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    """One level of extends: mappings merge, lists and scalars are replaced."""
    assert merge({"a": {"x": 1, "y": [1, 2]}, "b": 1}, {"a": {"y": [3]}, "b": 2}) == {
        "a": {"x": 1, "y": [3]},
        "b": 2,
    }
    write(tmp_path / "base.yaml", tiny_recipe())
    child = write(
        tmp_path / "child.yaml", {"extends": "base.yaml", "seed": 9, "batch": {"gpus": 4}}
    )
    recipe = load_recipe(child)
    assert (recipe.seed, recipe.batch.gpus, recipe.batch.per_device) == (9, 4, 3)


def test_extends_is_one_level(tmp_path: Path) -> None:
    """A base that extends another is refused by name."""
    write(tmp_path / "a.yaml", tiny_recipe())
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(RecipeError, match=r"b.yaml itself extends a.yaml; one level"):
        load_recipe(write(tmp_path / "c.yaml", {"extends": "b.yaml"}))


def test_overrides_go_through_the_same_validation(tmp_path: Path) -> None:
    """key.path=value is parsed as YAML, merged and checked like the file."""
    path = write(tmp_path / "r.yaml", tiny_recipe())
    recipe = load_recipe(path, ["optimizer.lr=1e-2", "optimizer.betas=[0.8, 0.9]", "seed=3"])
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.seed) == (0.01, [0.8, 0.9], 3)
    for bad, message in [
        ("optimizer.lrr=1", "Did you mean 'lr'"),
        ("optimizer.lr", "expected key.path=value"),
        ("optimizer..lr=1", "expected key.path=value"),
        ("optimizer.lr=[", "not valid YAML"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, [bad])


def test_relative_paths_count_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a file counts from that file; one on the command line from the current folder."""
    data = {"source": "files", "name": None, "path": "x/*.txt", "task": "causal_lm",
            "sequence_length": 8, "samples": None}  # fmt: skip
    path = write(tmp_path / "r.yaml", tiny_recipe(data=data))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path).data.path == str(tmp_path / "x/*.txt")
    assert load_recipe(path, ["data.path=y.txt"]).data.path == str(elsewhere / "y.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("- 1\n", "holds a list"), ("a: [", "not valid YAML"), ("\udcff", "")],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: str, message: str) -> None:
    """An empty file, a list, broken YAML and bytes that are not text each have one message."""
    path = tmp_path / "r.yaml"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(RecipeError, match=message or "not UTF-8 text"):
        load_recipe(str(path))


def test_a_missing_file_suggests_a_shipped_recipe() -> None:
    """A name that is nearly a shipped one is answered with it."""
    with pytest.raises(RecipeError, match="Did you mean the shipped recipe 'tiny-code-lm'"):
        load_recipe("tiny-code-ml")


def test_the_resolved_recipe_is_read_back_equal() -> None:
    """recipe.yaml of a run folder means the same recipe."""
    for name in catalogue.names():
        recipe = load_recipe(name)
        text = yaml12.dump(recipe.model_dump(by_alias=True))
        assert validate(yaml12.parse(text), name) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("early-stopping={}", "early-stopping: unknown key. Did you mean 'early_stopping'"),
        ("launch.max-restarts=3", "launch.max-restarts: unknown key. Did you mean 'max_restarts'"),
        ("model.str=3", "model.str: unknown key"),
        ("extends=foo", "extends belongs in the recipe's file"),
        ("seed=!!int abc", "not valid YAML"),
        ("seed=!!bool maybe", "not valid YAML"),
        ("seed=!!timestamp x", "not valid YAML: unknown tag"),
        ("data.options=!!set {a}", "not valid YAML: unknown tag"),
        (f"seed={'9' * 5000}", "not valid YAML"),
        ("data.path=~nosuchuser/x", "no such user"),
        ("schema=true", "schema: True"),
        (f"duration.steps={10**400}", "duration.steps"),
        ('schedule={name: piecewise, milestones: {"nan": 0.1}}', "must ascend"),
        ('schedule={name: piecewise, milestones: {"1.7": 0.1}}', "a step is a whole number"),
    ],
)
def test_odd_overrides_are_refused_cleanly(tmp_path: Path, override: str, message: str) -> None:
    """Hyphens, tags, huge numbers and unknown users each get a RecipeError, never a traceback."""
    path = write(tmp_path / "r.yaml", tiny_recipe())
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def test_a_base_finds_its_own_factories(tmp_path: Path) -> None:
    """extends: a shipped factory recipe from another folder keeps the base's code folder."""
    child = write(tmp_path / "x.yaml", {"extends": "worked-example", "recipe": "x"})
    assert load_recipe(child).project == str(catalogue.folder())


def test_an_override_s_mistake_is_not_the_file_s(tmp_path: Path) -> None:
    """The message names the command line; a key of a section is offered with its section."""
    path = write(tmp_path / "r.yaml", tiny_recipe())
    with pytest.raises(RecipeError, match=r"^command line: optimizer.lrr: unknown key"):
        load_recipe(path, ["optimizer.lrr=1"])
    with pytest.raises(RecipeError, match=r"gpus: unknown key. Did you mean 'batch.gpus'"):
        load_recipe(path, ["gpus=6"])


def test_one_slip_is_one_message() -> None:
    """A misspelt required section is not also told as missing."""
    raw = tiny_recipe()
    raw["optimiser"] = raw.pop("optimizer")
    with pytest.raises(RecipeError) as caught:
        validate(raw, "r")
    assert str(caught.value) == "r: optimiser: unknown key. Did you mean 'optimizer'?"


@pytest.mark.parametrize("folder", ["exp [a]", "exp *", "what?", "[!x]", "plain"])
@pytest.mark.parametrize(
    "pattern", ["corpus/*.txt", "corpus/1.txt", "../{folder}/corpus/[0-9].txt", "**/1.txt"]
)
def test_only_what_the_person_wrote_is_a_pattern(tmp_path: Path, folder: str, pattern: str) -> None:
    """Brackets and stars of the recipe's folder are its name, also where a sibling would match them."""
    for name, text in (
        (folder, "mine"),
        ("exp a", "other"),
        ("exp x", "other"),
        ("whats", "other"),
        ("y", "other"),
    ):
        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "corpus/1.txt").write_text(text)
    recipe = tiny_recipe(
        data={"source": "files", "name": None, "path": pattern.format(folder=glob.escape(folder))}
    )
    where = write(tmp_path / folder / "r.yaml", recipe)
    (found,) = matching_files(load_recipe(where).data)
    assert found.read_text() == "mine"
    (found,) = matching_files(override(load_recipe(where), ["seed=3"]).data)
    assert found.read_text() == "mine"
    (tmp_path / folder / "corpus/1.txt").unlink()
    with pytest.raises(DataError, match="matches no file|does not exist"):
        matching_files(load_recipe(where).data)


@pytest.mark.parametrize("text", ["a pipe", "a folder", "too large"])
def test_what_is_no_recipe_is_told(tmp_path: Path, text: str) -> None:
    """Nothing waits for a pipe, and nothing large is read."""
    path = tmp_path / "r.yaml"
    if text == "a pipe":
        os.mkfifo(path)
    elif text == "a folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(40 << 30)
    with pytest.raises(RecipeError, match="r.yaml"):
        load_recipe(str(path))
