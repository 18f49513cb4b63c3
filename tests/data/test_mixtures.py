"""Prepared mixtures: every source's rows are those that it has alone, and what does not go together is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drumline.data.cache import cache_folder
from drumline.data.dataset_manifest import DatasetManifest, read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.show import show
from drumline.data.tasks import find_task
from drumline.errors import DataError
from drumline.recipe.data_section import Data

PAIRS = [{"prompt": f"p{n}", "completion": "x" * (n % 7 + 1)} for n in range(40)]
CHATS = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * (n % 5 + 1)}]}
         for n in range(25)]  # fmt: skip
SHAREGPT = [{"conversations": [{"from": "human", "value": f"h{n}"}, {"from": "gpt", "value": "b" * (n % 4 + 1)}]}
            for n in range(20)]  # fmt: skip
TEXTS = [{"text": f"some words of text {n} " * (n % 3 + 1)} for n in range(30)]
CLASSES = [{"text": f"row {n}", "label": n % 2} for n in range(20)]
MORE_CLASSES = [{"text": f"other {n}", "label": n % 5} for n in range(30)]


def written(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, weight: float = 1.0, **keys: Any) -> dict[str, Any]:
    return {"weight": weight, "source": "files", "path": path, **keys}


def mixed(sources: list[dict[str, Any]], **keys: Any) -> Data:
    return Data.model_validate({"source": "mixture", "mixture": sources, **keys})


def manifest_of(data: Data) -> DatasetManifest:
    found = read_dataset_manifest(prepare(data, None))
    assert found
    return found


KINDS: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "sft": (PAIRS, PAIRS[::3], {"task": "sft", "sequence_length": 12}),
    "chats": (CHATS, SHAREGPT, {"task": "sft", "sequence_length": 64, "chat_template": "chatml"}),
    "stream": (TEXTS, TEXTS[::2], {"task": "causal_lm", "sequence_length": 16}),
    "documents": (TEXTS, TEXTS[::2], {"task": "causal_lm", "sequence_length": 48, "packing": "documents"}),
    "packed chats": (CHATS, SHAREGPT, {"task": "sft", "sequence_length": 96, "packing": "documents", "chat_template": "chatml"}),
    "classes": (CLASSES, MORE_CLASSES, {"task": "classification", "sequence_length": 32}),
}  # fmt: skip


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_each_source_are_those_it_has_alone(
    tmp_path: Path, kind: str, validation: float
) -> None:
    """Tokens, targets, positions and classes, in training and in each source's own validation rows."""
    first, second, keys = KINDS[kind]
    keys = {**keys, "validation": validation}
    paths = [written(tmp_path, "first", first), written(tmp_path, "second", second)]
    both = mixed([source(path) for path in paths], **keys)
    folder, manifest = prepare(both, None), manifest_of(both)
    offset = 0
    for label, path in zip(("first", "second"), paths, strict=True):
        alone = Data(source="files", path=path, **keys)
        parts = {"train": "train", **({"validation": f"evaluation-{label}"} if validation else {})}
        for part, mixed_part in parts.items():
            ours = Rows(folder, mixed_part, find_task(both, None))
            theirs = Rows(prepare(alone, None), part, find_task(alone, None))
            start = offset if part == "train" else 0
            for number in range(len(theirs)):
                one = ours.collate(np.array([start + number]))
                other = theirs.collate(np.array([number]))
                assert one.keys() == other.keys()
                for name in one:
                    assert np.array_equal(one[name], other[name]), (kind, label, part, number, name)
        count = manifest_of(alone).samples
        assert manifest.mixture[label] == count
        offset += count
    assert manifest.samples == offset
    assert set(manifest.evaluation) == ({"first", "second"} if validation else set())
    if kind == "classes":
        assert manifest.classes == 5


def test_weights_and_samples_of_an_epoch_need_no_new_preparation(tmp_path: Path) -> None:
    """They change no row; another label or file does."""
    a, b = written(tmp_path, "a", PAIRS), written(tmp_path, "b", PAIRS[::2])
    keys = {"task": "sft", "sequence_length": 12}
    folder = cache_folder(mixed([source(a), source(b)], **keys), None)
    assert cache_folder(mixed([source(a, 3.0), source(b, 0.1)], samples=77, **keys), None) == folder
    assert cache_folder(mixed([source(a, label="x"), source(b)], **keys), None) != folder
    before = manifest_of(mixed([source(a), source(b)], **keys)).fingerprint
    (tmp_path / "other").mkdir()
    moved = [
        source(written(tmp_path / "other", name, rows))
        for name, rows in (("a", PAIRS), ("b", PAIRS[::2]))
    ]
    assert manifest_of(mixed(moved, **keys)).fingerprint == before


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        (CHATS, {}, r"data\.mixture\[1\]: its rows are .*, and the training rows are prompts and completions"),
        ([{"prompt": "p"}], {}, r"data\.mixture\[1\]: .*bad\.jsonl, line 1: .*completion_field: no text"),
        ([], {}, r"data\.mixture\[1\]\.path: .*bad\.jsonl is empty"),
        ([{"prompt": "p" * 99, "completion": "c"}], {}, r"data\.mixture\[1\]: 1 documents gave no training rows: 1 have no target"),
        (PAIRS[:1], {"validation": 0.3}, r"data\.mixture\[1\]\.validation: 0\.3 × 1 documents"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_of_its_source(
    tmp_path: Path, rows: list[Any], keys: dict[str, Any], words: str
) -> None:
    """With its number in the list, before anything is published."""
    good, bad = written(tmp_path, "good", PAIRS), written(tmp_path, "bad", rows)
    data = mixed([source(good), source(bad)], task="sft", sequence_length=12, **keys)
    with pytest.raises(DataError, match=words):
        prepare(data, None)
    assert not cache_folder(data, None).exists()
    with pytest.raises(
        DataError, match=r"data\.mixture\[0\]\.path: .*nowhere\.jsonl does not exist"
    ):
        prepare(
            mixed(
                [source(str(tmp_path / "nowhere.jsonl")), source(good)],
                task="sft",
                sequence_length=12,
            ),
            None,
        )


def test_each_source_has_fields_of_its_own(tmp_path: Path) -> None:
    """Column names that one source states hold for it alone; rows of all of them are shown."""
    other = [{"ask": row["prompt"], "say": row["completion"]} for row in PAIRS]
    a, b = written(tmp_path, "a", PAIRS), written(tmp_path, "b", other)
    data = mixed(
        [source(a), source(b, prompt_field="ask", completion_field="say")],
        task="sft",
        sequence_length=12,
    )
    assert manifest_of(data).mixture == {"a": 40, "b": 40}
    rows = list(show(data, None, 2).rows)
    assert [row.where.split(": ")[0] for row in rows] == ["a", "a", "b", "b"]
    assert rows[0].pieces == rows[2].pieces
