"""Rows for evaluation: a seeded draw that no order of the rows can meet, or sets of their own."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import tiny_recipe
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import Encoded, find_task
from drumline.data.validation_split import VALIDATION, Drawn, Periodic, Stratified
from drumline.errors import DataError, PlanError, RecipeError
from drumline.plan.identity import training_sha256
from drumline.recipe import yaml12
from drumline.recipe.data_section import ALONE, Data, EvaluationSet
from drumline.recipe.load import load_recipe, override, validate
from drumline.session.planning import make_plan


def labelled(folder: Path, labels: list[int], name: str = "rows.jsonl") -> Path:
    path = folder / name
    rows = [{"text": f"row {n}", "label": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(path: Path, **changes: Any) -> Data:
    return Data(**{"source": "files", "path": str(path), "task": "classification", **changes})


def labels_of(data: Data, part: str) -> Counter[int]:
    folder = prepare(data, None)
    return Counter(Rows(folder, part, find_task(data, None)).column("labels").tolist())


@pytest.mark.parametrize(
    ("labels", "share", "each"),
    [
        ([n % 10 for n in range(200)], 0.1, dict.fromkeys(range(10), 2)),
        ([n % 2 for n in range(40)], 0.5, {0: 10, 1: 10}),
        ([0] * 60 + [1] * 30 + [2] * 10, 0.2, {0: 12, 1: 6, 2: 2}),
        ([n % 3 for n in range(30)], 0.3, {0: 3, 1: 3, 2: 3}),
    ],
)
def test_every_class_has_its_share(
    tmp_path: Path, labels: list[int], share: float, each: dict[int, int]
) -> None:
    """Classes in turn, in blocks, with any period: the share of each, in both parts."""
    data = data_of(labelled(tmp_path, labels), validation=share)
    found = labels_of(data, "validation")
    assert found == Counter(each)
    assert labels_of(data, "train") + found == Counter(labels)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=300),
    share=st.fractions(Fraction(1, 50), Fraction(9, 10), max_denominator=100),
)
def test_no_class_is_far_from_its_share(labels: list[int], share: Fraction) -> None:
    """In any order of any labels: the exact number of rows, all of them in order, each class within two rows."""
    split = Stratified(share, seed=0)
    placed = [
        one for n, label in enumerate(labels) for one in split.place(n, Encoded(1, label=label))
    ]
    placed += split.finish()
    assert [sample.label for _, sample in placed] == labels
    found = Counter(sample.label for part, sample in placed if part == VALIDATION)
    assert found.total() == int(len(labels) * share)
    for label, number in Counter(labels).items():
        assert abs(found[label] - number * share) < 2


def test_the_seed_draws_and_the_old_split_stays_at_hand(tmp_path: Path) -> None:
    """The same seed gives the same rows; another gives others; `periodic` takes every fifth."""
    path = labelled(tmp_path, list(range(50)))
    fingerprints = []
    for changes in ({}, {}, {"validation_seed": 1}, {"validation_split": "periodic"}):
        manifest = read_dataset_manifest(prepare(data_of(path, validation=0.2, **changes), None))
        assert manifest
        assert (manifest.samples, manifest.validation_samples) == (40, 10)
        fingerprints.append(manifest.fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
    periodic = data_of(path, validation=0.2, validation_split="periodic")
    assert set(labels_of(periodic, "validation")) == set(range(4, 50, 5))


@given(
    share=st.fractions(Fraction(1, 500), Fraction(99, 100), max_denominator=500),
    documents=st.integers(1, 400),
    seed=st.integers(0, 5),
)
def test_a_draw_keeps_the_share(share: Fraction, documents: int, seed: int) -> None:
    """As many as a periodic split, or one more, of a window that is not whole."""
    drawn, periodic = Drawn(share, seed), Periodic(share)
    found = [n for n in range(documents) if drawn.part_of(n) == VALIDATION]
    as_many = sum(periodic.part_of(n) == VALIDATION for n in range(documents))
    assert len(found) in (as_many, as_many + 1)


def test_two_documents_in_turn_are_both_in_both_parts(tmp_path: Path) -> None:
    """Without labels: texts a and b in turn, half of them for validation."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "ab"[n % 2]}) + "\n" for n in range(200)))
    data = Data(source="files", path=str(path), task="causal_lm", sequence_length=8, validation=0.5)
    folder = prepare(data, None)
    for part in ("train", "validation"):
        tokens = Rows(folder, part, find_task(data, None)).column("tokens").tolist()
        assert 30 < tokens.count(ord("a")) < 70
        assert tokens.count(256) == 100


def test_advice_for_too_small_a_share_works(tmp_path: Path) -> None:
    """Three rows at 0.3: what the message says is nearest gives one row."""
    for task in ("classification", "sft"):
        path = tmp_path / f"{task}.jsonl"
        rows = [{"text": "t", "label": 0, "prompt": "p", "completion": "c"}] * 3
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for share in (0.1, 0.01, 0.001):
            data = data_of(path, task=task, sequence_length=8, validation=share)
            try:
                prepare(data, None)
            except DataError as error:
                share = float(str(error).partition("Nearest: validation ")[2].split()[0])
                data = data_of(path, task=task, sequence_length=8, validation=share)
            manifest = read_dataset_manifest(prepare(data, None))
            assert manifest
            assert manifest.validation_samples == 1


def test_a_recorded_recipe_of_before_keeps_its_split_and_its_hash() -> None:
    """It states every key but this one; a person's recipe, and a recorded one of now, have the draw."""
    recipe = validate(tiny_recipe(), "r")
    assert recipe.data.validation_split == "drawn"
    plain = recipe.model_dump(by_alias=True)
    assert validate(plain, "r").data.validation_split == "drawn"
    for later in ("validation_split", "validation_seed", "evaluation"):
        plain["data"].pop(later)
    old = validate(plain, "r")
    assert old.data.validation_split == "periodic"
    stated = override(recipe, ["data.validation_split=periodic"])
    assert training_sha256(old) == training_sha256(stated) != training_sha256(recipe)
    without = override(recipe, ["data.validation=0", "evaluation=null"])
    assert without.data.validation_split == "drawn"
    none = validate(tiny_recipe(data={"validation": 0.0}), "r")
    assert none.data.validation_split is None
    assert override(none, ["data.validation=0.5"]).data.validation_split == "drawn"


def test_sets_of_their_own(tmp_path: Path) -> None:
    """Two named sets: parts of the same folder, with their own files and column; all trained rows are trained."""
    train = labelled(tmp_path, [0, 1, 2] * 4)
    labelled(tmp_path, [0, 1], "clean.jsonl")
    (tmp_path / "noisy.csv").write_text("text,class\nx,2\ny,2\nz,0\n")
    sets = {
        "clean": {"source": "files", "path": str(tmp_path / "clean.jsonl")},
        "noisy": {"source": "files", "path": str(tmp_path / "noisy.csv"), "label_field": "class"},
    }
    data = data_of(train, evaluation=sets)
    manifest = read_dataset_manifest(prepare(data, None))
    assert manifest
    assert manifest.samples == 12
    assert manifest.evaluation == {"clean": 2, "noisy": 3}
    assert manifest.validation_samples == 5
    assert labels_of(data, manifest.evaluation_parts["noisy"]) == Counter({2: 2, 0: 1})
    alone = read_dataset_manifest(prepare(data_of(train), None))
    assert alone
    assert alone.fingerprint != manifest.fingerprint
    labelled(tmp_path, [1, 1], "clean.jsonl")
    changed = read_dataset_manifest(prepare(data, None))
    assert changed
    assert changed.fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([3], r"data.evaluation: class 3, and the training rows have classes 0 to 2"),
        ([], r"data.evaluation.path: .*eval.jsonl is empty"),
        (None, r"data.evaluation.path: .*eval.jsonl does not exist"),
    ],
)
def test_a_set_that_does_not_go_with_the_rows(
    tmp_path: Path, labels: list[int] | None, words: str
) -> None:
    """Refused with the key of the set, before anything is published."""
    if labels is not None:
        labelled(tmp_path, labels, "eval.jsonl")
    own = {"source": "files", "path": str(tmp_path / "eval.jsonl")}
    with pytest.raises(DataError, match=words):
        prepare(data_of(labelled(tmp_path, [0, 1, 2]), evaluation=own), None)


def test_recipes_that_contradict_themselves() -> None:
    """A share and a set, a set that nobody evaluates, a metric of a set that is not there, the trained split."""
    with pytest.raises(ValidationError, match="a set of the hub needs split"):
        data_of(Path("/x.jsonl"), evaluation={"source": "hub", "name": "a/b"})
    own = {"source": "files", "path": "/e.jsonl"}
    with pytest.raises(ValidationError, match="takes a share of these"):
        data_of(Path("/x.jsonl"), evaluation=own, validation=0.1)
    evaluated = {"validation": 0.0, "evaluation": own}
    with pytest.raises(RecipeError, match="data.evaluation is never evaluated"):
        validate(tiny_recipe(data=evaluated), "r")
    with pytest.raises(RecipeError, match="eval/clean/loss: no such evaluation; there are none"):
        validate(
            tiny_recipe(
                data=evaluated,
                evaluation={"every_steps": 5},
                early_stopping={"metric": "eval/clean/loss"},
            ),
            "r",
        )


@pytest.mark.parametrize("task", ["causal_lm", "sft", "classification"])
def test_samples_stop_the_reading(tmp_path: Path, task: str) -> None:
    """The first 40 training rows of a file whose last row is broken: what comes after is not even read."""
    rows = [
        {"text": "ten letters", "prompt": "p", "completion": "c", "label": n % 2}
        for n in range(200)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    stated = data_of(path, task=task, sequence_length=8, validation=0.1, samples=40)
    manifest = read_dataset_manifest(prepare(stated, None))
    assert manifest
    assert manifest.samples == 40
    assert 1 <= manifest.validation_samples <= 10
    with pytest.raises(DataError, match="rows.jsonl, line 201"):
        prepare(stated.model_copy(update={"samples": None}), None)
    short = data_of(labelled(tmp_path, [0, 1] * 9, "short.jsonl"), samples=40)
    recipe = validate(tiny_recipe(data={**short.model_dump(), "validation": 0.0}), "r")
    prepare(recipe.data, None)
    with pytest.raises(PlanError, match="data.samples: 40, but the prepared data hold 18"):
        make_plan(recipe)


def test_samples_of_one_long_document(tmp_path: Path) -> None:
    """A text of many blocks, of which the first rows are enough."""
    (tmp_path / "long.txt").write_text("some words\n" * 200_000)
    data = Data(
        source="files",
        path=str(tmp_path / "long.txt"),
        task="causal_lm",
        sequence_length=64,
        samples=100,
    )
    manifest = read_dataset_manifest(prepare(data, None))
    assert manifest
    assert manifest.samples == 100


def test_a_recorded_split_reads_all_rows(tmp_path: Path) -> None:
    """`periodic` with `samples`: as many rows for validation as runs had that read to the end."""
    path = labelled(tmp_path, [n % 2 for n in range(50)])
    stated = data_of(path, validation=0.2, validation_split="periodic", samples=40)
    manifests = [
        read_dataset_manifest(prepare(stated.model_copy(update={"samples": samples}), None))
        for samples in (40, None)
    ]
    assert manifests[0]
    assert manifests[1]
    assert manifests[0].validation_samples == 10
    assert manifests[0].fingerprint == manifests[1].fingerprint


def test_advice_counts_the_rows_that_are_kept(tmp_path: Path) -> None:
    """Five of ten rows have no target: a tenth of five is none, and the advice says a fifth."""
    rows = [{"prompt": "p" * (20 if n % 2 else 1), "completion": "c"} for n in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of(path, task="sft", sequence_length=8)
    for share in (0.1, 0.2):
        told = ""
        try:
            prepare(
                data.model_copy(update={"validation": share, "validation_split": "drawn"}), None
            )
        except DataError as error:
            told = str(error)
        assert ("Nearest: validation 0.2 (one document)" in told) == (share == 0.1)


def test_texts_beside_features_are_refused(tmp_path: Path) -> None:
    """An evaluation set whose rows are of another kind than those that are trained."""
    own = {"source": "files", "path": str(labelled(tmp_path, [0, 1]))}
    features = Data(
        source="builtin", name="synthetic-classification", task="classification", evaluation=own
    )
    with pytest.raises(
        DataError, match=r"data.evaluation: its rows have tokens.*training rows have features"
    ):
        prepare(features, None)


def test_a_path_of_a_set_is_of_its_file(tmp_path: Path) -> None:
    """Also where the set is stated in part, or is changed on the command line; named sets too."""
    (tmp_path / "below").mkdir()
    base = yaml12.dump({**tiny_recipe(), "data": {"source": "files", "path": "x.jsonl", "task": "classification",
                        "evaluation": {"source": "files", "path": "e.jsonl"}}, "evaluation": {"every_steps": 5}})  # fmt: skip
    (tmp_path / "below/base.yaml").write_text(base)
    child = {"extends": "base.yaml", "data": {"evaluation": {"path": "f.jsonl"}}}
    (tmp_path / "below/child.yaml").write_text(yaml12.dump(child))
    recipe = load_recipe(str(tmp_path / "below/child.yaml"))
    assert recipe.data.evaluation
    assert recipe.data.evaluation[ALONE].path == str(tmp_path / "below/f.jsonl")
    changed = override(recipe, ["data.evaluation.path=/g.jsonl"])
    assert changed.data.evaluation
    assert changed.data.evaluation[ALONE].path == "/g.jsonl"
    named = {"source": {"source": "files", "path": "g.jsonl"}}
    (tmp_path / "below/named.yaml").write_text(base.replace("x.jsonl", "y.jsonl"))
    assert data_of(tmp_path / "x", evaluation=named).evaluation == {
        "source": EvaluationSet(source="files", path="g.jsonl")
    }
