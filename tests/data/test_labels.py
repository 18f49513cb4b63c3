"""Labels of rows: numbers, several classes, and classes of two texts; what is none is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from advice import heard
from data.test_tokenizers import llama
from drumline.data.dataset_manifest import DatasetManifest, read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.data.tokenizers import HubTokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import Data


def prepared(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[Rows, DatasetManifest]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data.model_validate({"source": "files", "path": str(path), **keys})
    where = prepare(data, None)
    manifest = read_dataset_manifest(where)
    assert manifest
    return Rows(where, "train", find_task(data, None)), manifest


def bert_of_pairs(folder: Path) -> Path:
    """WordPiece that marks which text a token is of, as BERT's own does."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {
        word: number for number, word in enumerate([*marks, "the", "cat", "answer", ":", "yes"])
    }
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)
    return folder


def labels(*values: Any) -> list[dict[str, Any]]:
    return [{"text": f"row {n}", "label": value} for n, value in enumerate(values)]


def targets(rows: Rows) -> list[Any]:
    return rows.collate(np.arange(len(rows)))["targets"].tolist()  # type: ignore[no-any-return]


def test_numbers(tmp_path: Path) -> None:
    """One or several, in JSON or as text; the head has as many outputs."""
    rows, manifest = prepared(tmp_path, labels(0.5, -100, 3, "2.5"), task="regression")
    assert targets(rows) == [[0.5], [-100.0], [3.0], [2.5]]
    assert manifest.classes == 1
    assert rows.collate(np.arange(4))["targets"].dtype == np.float32
    rows, manifest = prepared(tmp_path, labels([1, 2.5], [0, -1]), task="regression")
    assert targets(rows) == [[1.0, 2.5], [0.0, -1.0]]
    assert manifest.classes == 2


def test_classes_of_a_row(tmp_path: Path) -> None:
    """By number, or a yes or no for each."""
    wanted = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    for values in (
        ([0, 2], [], [1]),
        ([True, False, True], [False, False, False], [False, True, False]),
        ([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
    ):
        rows, manifest = prepared(tmp_path, labels(*values), task="multi_label")
        assert targets(rows) == wanted
        assert manifest.classes == 3


@pytest.mark.parametrize(
    ("task", "values", "words"),
    [
        ("regression", [1.0, "high"], r"line 2: data\.label_field: label: 'high' is no number"),
        ("regression", [1.0, None], "line 2: .*None is no number"),
        ("regression", [True], "line 1: .*True is no number"),
        ("regression", [1.0, [1.0, 2.0]], "line 2: .*2 numbers, and earlier rows have 1"),
        ("regression", [1e300], "line 1: .*not finite in fp32"),
        ("multi_label", [[0], 1], "line 2: .*1 is no list"),
        (
            "multi_label",
            [[0], [True, False]],
            "line 2: .*a list of yes and no, and earlier rows were not",
        ),
        ("multi_label", [[True, False], [True]], "line 2: .*1 yes and no, and earlier rows have 2"),
        ("multi_label", [[0.5, 1.0]], "neither 0.0 nor 1.0"),
        ("multi_label", [[0, -1]], "-1 is not a class number"),
    ],
)
def test_what_is_no_label_is_refused(
    tmp_path: Path, task: str, values: list[Any], words: str
) -> None:
    """With file, line and value."""
    with pytest.raises(DataError, match=rf"rows\.jsonl, .*{words}"):
        prepared(tmp_path, labels(*values), task=task)


def test_lists_of_0_and_1_are_not_guessed(tmp_path: Path) -> None:
    """As class numbers they would name a class twice, or say yes to all: as the message says, they become bools."""
    with pytest.raises(DataError) as told:
        prepared(tmp_path, labels([0, 1, 0], [1, 0, 0]), task="multi_label")
    heard("names a class twice. Nearest: for a yes or no of each class", str(told.value))
    with pytest.raises(DataError) as told:
        prepared(tmp_path, labels([0, 1], [1, 0]), task="multi_label")
    heard("so there is nothing to learn. Nearest: for a yes or no of each class", str(told.value))
    rows, _ = prepared(tmp_path, labels([False, True], [True, False]), task="multi_label")
    assert targets(rows) == [[0, 1], [1, 0]]


def test_evaluation_rows_have_as_many_numbers(tmp_path: Path) -> None:
    """A set of its own with other outputs is refused before anything trains."""
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "x", "label": [1.0, 2.0]}) + "\n")
    own = {"evaluation": {"set": {"source": "files", "path": str(tmp_path / "eval.jsonl")}}}
    with pytest.raises(
        DataError, match=r"data\.evaluation\.set\.label_field: 2 numbers a row, .* have 1"
    ):
        prepared(tmp_path, labels(1.0, 2.0), task="regression", **own)


@pytest.mark.parametrize("most", [None, 12, 7])
def test_two_texts_are_tokenised_as_by_transformers(tmp_path: Path, most: int | None) -> None:
    """Ids, and which text a token is of, cut where the longer one is; a model without types gets none."""
    pairs = [
        {"text": "the cat " * (n % 5 + 1), "other": "answer: yes " * (n % 3 + 1), "label": n % 2}
        for n in range(12)
    ]
    folder = bert_of_pairs(tmp_path / "bert")
    keys = {"task": "classification", "text_pair_field": "other", "sequence_length": most}
    rows, _ = prepared(tmp_path, pairs, tokenizer=str(folder), **keys)
    inner = AutoTokenizer.from_pretrained(folder)
    found = rows.collate(np.arange(12))
    options = {"truncation": "longest_first", "max_length": most} if most else {}
    for number, pair in enumerate(pairs):
        wanted = inner(pair["text"], pair["other"], **options)
        size = len(wanted["input_ids"])
        assert found["input_ids"][number, :size].tolist() == wanted["input_ids"]
        assert found["token_type_ids"][number].tolist() == wanted["token_type_ids"] + [0] * (
            found["input_ids"].shape[1] - size
        )
        single = HubTokenizer(str(folder), needs_end=False).encode_row(
            pair["text"], most, pair["other"]
        )
        assert single.tokens.tolist() == wanted["input_ids"]
    rows, _ = prepared(tmp_path, pairs, tokenizer=str(llama(tmp_path / "llama")), **keys)
    assert "token_type_ids" not in rows.collate(np.arange(2))
    rows, _ = prepared(tmp_path, pairs, **keys)
    first = bytes(rows.collate(np.arange(1))["input_ids"][0][:8].astype(np.uint8))
    assert first[:7] == b"the cat"
