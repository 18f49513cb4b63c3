"""Rows of preferences in the styles of public data sets: which tokens are read and trained, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advice import heard
from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.show import show
from drumline.data.tasks import find_task
from drumline.data.tasks.base import IGNORED
from drumline.errors import DataError
from drumline.recipe.data_section import Data
from drumline.recipe.load import validate

U, A = "user", "assistant"


def says(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def from_value(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


TEXTS = [(("Say it:", " yes"), ("Say it:", " no"))]
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
CHATS = [((CHAT, "yes<|im_end|>\n"), (CHAT, "no<|im_end|>\n"))]
STYLES: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "explicit texts": ({"prompt": "Say it:", "chosen": " yes", "rejected": " no"}, TEXTS, "pairs of texts (prompt in prompt)"),
    "implicit texts": ({"chosen": "Say it: yes", "rejected": "Say it: no"}, TEXTS, "pairs of texts (prompt within both)"),
    "a prompt within": ({"prompt": "Say it:", "chosen": "Say it: yes", "rejected": "Say it: no"}, TEXTS, "pairs of texts (prompt within both)"),
    "hh": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: Yet"},
           [(("\n\nHuman: Hi\n\nAssistant:", " Yes"), ("\n\nHuman: Hi\n\nAssistant:", " Yet"))], "pairs of texts (prompt within both)"),
    "explicit chats": ({"prompt": says((U, "Hi")), "chosen": says((A, "yes")), "rejected": says((A, "no"))}, CHATS, "pairs of chats (prompt in prompt)"),
    "implicit chats": ({"chosen": says((U, "Hi"), (A, "yes")), "rejected": says((U, "Hi"), (A, "no"))}, CHATS, "pairs of chats (prompt within both)"),
    "ultrafeedback": ({"prompt": "Hi", "chosen": says((U, "Hi"), (A, "yes")), "rejected": says((U, "Hi"), (A, "no")), "score_chosen": 8.5},
                      CHATS, "pairs of chats (prompt within both)"),
    "a text before chats": ({"prompt": "Hi", "chosen": says((A, "yes")), "rejected": says((A, "no"))}, CHATS, "pairs of chats (prompt in prompt)"),
    "sharegpt ranking": ({"conversations": from_value(("human", "Hi")), "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
                         CHATS, "pairs of chats (prompt in conversations)"),
    "labelled texts": ({"prompt": "Say it:", "completion": " yes", "label": True}, [(("Say it:", " yes"),)], "labelled texts (prompt and completion)"),
    "labelled chats": ({"prompt": says((U, "Hi")), "completion": says((A, "yes")), "label": "false"}, [(CHATS[0][0],)], "labelled chats (prompt and completion)"),
    "labelled whole chats": ({"messages": says((U, "Hi"), (A, "yes")), "label": 1}, [(CHATS[0][0],)], "labelled chats (messages)"),
}  # fmt: skip


def data_of(folder: Path, *rows: dict[str, Any], **keys: Any) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"source": "files", "name": None, "path": str(path), "task": "preference", "sequence_length": 120,
               "samples": None, "validation": 0.0, **keys}  # fmt: skip
    recipe = tiny_recipe(
        data=section, model={"source": "config", "factory": None, "architecture": "llama"}
    )
    return validate(recipe, "r").data  # fmt: skip


def prepared(data: Data) -> Rows:
    return Rows(prepare(data, None), "train", find_task(data, None))


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if 0 <= token < 256).decode()


@pytest.mark.parametrize("style", STYLES)
def test_styles(tmp_path: Path, style: str) -> None:
    """Prompt and trained completion of each sequence, as bytes; the style is told."""
    row, wanted, words = STYLES[style]
    is_chat = "chats" in words
    data = data_of(tmp_path, row, row, **({"chat_template": "chatml"} if is_chat else {}))
    rows = prepared(data)
    assert rows.manifest.style == words
    assert len(rows) == 2
    assert rows.counts.tolist() == [1, 1]
    found = rows.collate(np.array([1]))
    assert len(found["input_ids"]) == rows.manifest.sequences == len(wanted[0])
    for ids, targets, (prompt, completion) in zip(
        found["input_ids"], found["targets"], wanted[0], strict=True
    ):
        trained = targets[targets != IGNORED].tolist()
        first = int(np.flatnonzero(targets != IGNORED)[0])
        assert text_of(ids[: first + 1].tolist()) == prompt
        assert text_of(trained) == completion.removesuffix("\n" if is_chat else "")
        assert is_chat or trained[-1] == 256
    (shown,) = show(data, None, 1).rows
    assert wanted[0][0][1].strip() in "".join(text for text, trained in shown.pieces if trained)


def test_labels_are_stored(tmp_path: Path) -> None:
    """Booleans, numbers and words; the reference is added beside them once it is known."""
    labels = [True, False, 1, 0, "true", "False"]
    data = data_of(
        tmp_path,
        *({"prompt": "p", "completion": f" {n}", "label": x} for n, x in enumerate(labels)),
    )
    rows = prepared(data)
    everything = np.arange(6)
    assert rows.collate(everything)["desirable"].tolist() == [1, 0, 1, 0, 1, 0]
    rows.attach("reference", np.arange(12, dtype=np.float32).reshape(6, 2))
    assert rows.collate(np.array([4, 0]))["reference"].tolist() == [[8, 9], [0, 1]]


def test_long_rows_are_cut_and_dropped(tmp_path: Path) -> None:
    """A completion is cut at sequence_length; a row of which one completion does not fit is dropped, and counted."""
    good = {"prompt": "p" * 10, "chosen": "a" * 200, "rejected": "b"}
    bad = {"prompt": "p" * 130, "chosen": "a", "rejected": "b"}
    rows = prepared(data_of(tmp_path, good, bad, good))
    assert (len(rows), rows.manifest.dropped, rows.manifest.truncated) == (2, 1, 3)
    assert rows.manifest.longest == 120
    assert rows.lengths().tolist() == [121, 121]
    assert rows.manifest.lengths == [11] * 50 + [120] * 51


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "chosen and rejected, or prompt, completion and label; this row has: text"),
        ([{"prompt": "p", "completion": "c", "label": 2}] * 2, "label: 2 is neither true nor false"),
        ([{"prompt": "p", "completion": "c", "label": None}] * 2, "None is neither true nor false"),
        ([{"prompt": "p", "completion": "c", "label": True}], "1 of at least 2 rows in train"),
        ([{"prompt": "p", "chosen": "a", "rejected": None}], "rejected_field: no text in column 'rejected'; it is null"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}], "line 2: data.rejected_field"),
        ([{"prompt": "p", "chosen": "pa", "rejected": "pb"}, {"prompt": "p", "chosen": "xa", "rejected": "b"}], "line 2: .*the first row's texts begin with their prompt"),
        ([{"prompt": "other", "chosen": says((U, "Hi"), (A, "a")), "rejected": says((U, "Hi"), (A, "b"))}], "in which the prompt beside it does not occur"),
        ([{"prompt": says(("system", "S")), "chosen": says((U, "Hi"), (A, "a")), "rejected": says((U, "Hi"), (A, "b"))}], "in which the prompt beside it does not"),
        ([{"chosen": says((U, "Hi"), (A, "a")), "rejected": says((U, "Ho"), (A, "b"))}], "do not begin with the same message"),
        ([{"chosen": says((A, "a")), "rejected": says((A, "b"))}], "only the assistant's messages, and there is no column 'prompt'"),
        ([{"prompt": "p", "chosen": says((A, "a")), "rejected": says((U, "b"))}], "user after the user"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_preference_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], words: str
) -> None:
    """With the row and the column."""
    with pytest.raises(DataError, match=words):
        prepare(data_of(tmp_path, *rows, chat_template="chatml"), None)


def test_two_labelled_rows_are_enough(tmp_path: Path) -> None:
    """As the message for one says."""
    row = {"prompt": "p", "completion": "c", "label": True}
    with pytest.raises(DataError) as caught:
        prepare(data_of(tmp_path, row), None)
    heard("each is compared with another's completion", str(caught.value))
    assert len(prepared(data_of(tmp_path, row, row))) == 2


def test_a_whole_chat_needs_no_prompt(tmp_path: Path) -> None:
    """Without the column that contradicts it, as the message says."""
    row = {"chosen": says((U, "Hi"), (A, "a")), "rejected": says((U, "Hi"), (A, "b"))}
    with pytest.raises(DataError) as caught:
        prepare(data_of(tmp_path, {**row, "prompt": "other"}, chat_template="chatml"), None)
    heard("is a whole chat, in which the prompt beside it does not occur", str(caught.value))
    assert len(prepared(data_of(tmp_path, row, chat_template="chatml"))) == 1


def test_sources_of_a_mixture_must_agree(tmp_path: Path) -> None:
    """Pairs and labelled rows are not mixed, nor texts and chats."""
    pairs, labelled = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    labelled.write_text(json.dumps({"prompt": "p", "completion": "a", "label": True}) + "\n")
    sources = [{"weight": 1.0, "source": "files", "path": str(path)} for path in (pairs, labelled)]
    data = data_of(tmp_path, {}, source="mixture", path=None, mixture=sources)
    with pytest.raises(
        DataError, match=r"its rows are labelled texts .* training rows are pairs of"
    ):
        prepare(data, None)
    row = {"prompt": "p", "chosen": says((A, "a")), "rejected": says((A, "b"))}
    labelled.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        DataError, match=r"its rows are pairs of chats .* training rows are pairs of texts"
    ):
        prepare(data.model_copy(update={"chat_template": "chatml"}), None)


SYSTEM = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "Be kind."}
BESIDE = {"prompt": "Hi there", "chosen": "yes", "rejected": "no"}
WITHIN = {"prompt": "Hi there", "chosen": "Hi there yes", "rejected": "Hi there no"}


def refused_then(folder: Path, wrong: list[dict[str, Any]], right: int) -> str:
    with pytest.raises(DataError) as caught:
        prepare(data_of(folder, *wrong), None)
    assert len(prepared(data_of(folder, wrong[right]))) == 1
    return str(caught.value)


def test_rows_of_two_ways_are_refused(tmp_path: Path) -> None:
    """A prompt that some completions repeat, or that some lack, and a system message that no text has."""
    told = refused_then(tmp_path, [BESIDE, WITHIN], 1)
    heard("and those of the first row do not. Nearest: write all rows one way", told)
    told = refused_then(tmp_path, [WITHIN, {**WITHIN, "prompt": None}], 0)
    heard("is empty, and the first row has one. Nearest: write all rows one way", told)
    with pytest.raises(DataError) as caught:
        prepare(data_of(tmp_path, SYSTEM), None)
    heard("put it at the beginning of prompt, or write the rows as chats", str(caught.value))
    assert len(prepared(data_of(tmp_path, {**SYSTEM, "prompt": "Be kind. p", "system": ""}))) == 1
    chats = {name: says((A, SYSTEM[name])) for name in ("chosen", "rejected")}
    assert len(prepared(data_of(tmp_path, {**SYSTEM, **chats}, chat_template="chatml"))) == 1


def test_images_are_refused(tmp_path: Path) -> None:
    """They would be trained as a private letter of a text."""
    asked = {"role": U, "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}
    for row in (
        {"prompt": [asked], "chosen": says((A, "red")), "rejected": says((A, "blue"))},
        {"messages": [asked, *says((A, "red"))], "label": 1},
    ):
        with pytest.raises(DataError) as error:
            prepare(data_of(tmp_path, row, chat_template="chatml"), None)
        assert heard("an image is no text. Nearest: data.image", str(error.value))
