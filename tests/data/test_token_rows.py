"""Rows whose tokens have labels: classes of words, masked tokens, and texts to be written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from advice import heard
from data.test_tokenizers import bert, llama, saved
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.data.tasks.base import IGNORED
from drumline.errors import DataError
from drumline.plan.order import draw_seeds
from drumline.recipe.data_section import Data


def prepared(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"source": "files", "path": str(path), "sequence_length": 16}
    data = Data.model_validate({**base, **keys})
    return Rows(prepare(data, None), "train", find_task(data, None))


def roberta(folder: Path) -> str:
    """Byte-level BPE as RoBERTa has it: a word's first token depends on the space before it."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials)
    inner.train_from_iterator(["the cat sat on the mat and the catalogue mattered"] * 9, trainer)
    inner.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>",
             "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written.update(tokenizer_class="RobertaTokenizer", add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return str(folder)


def masked_bert(folder: Path) -> str:
    """WordPiece with a mask token, for words of a few letters."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    inner = Tokenizer(models.WordPiece({w: n for n, w in enumerate([*marks, *letters])}, unk_token="[UNK]"))  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return saved(folder, inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")  # fmt: skip


WORDS = [
    {"words": ["the", "catalogue", "sat"], "tags": [0, 1, 2]},
    {"words": ["mat"], "tags": [2]},
    {"words": ["the", "cat", "\u200b", "mattered"], "tags": [1, 0, 2, 1]},
]


def aligned(
    tokenizer: Any, words: list[str], tags: list[int], most: int
) -> tuple[list[int], list[int]]:
    """Tokens and classes as run_ner of transformers has them: a word's first token counts."""
    found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=most)
    before, classes = None, []
    for owner in found.word_ids():
        classes.append(IGNORED if owner is None or owner == before else tags[owner])
        before = owner
    return found.input_ids, classes


@pytest.mark.parametrize("made", [bert, roberta, masked_bert])
@pytest.mark.parametrize("most", [5, 16])
def test_words_are_labelled_as_in_transformers(tmp_path: Path, made: Any, most: int) -> None:
    """The same tokens and classes, also where a row is cut, and with a tokenizer that wants a space first."""
    where = made(tmp_path / "tokenizer")
    keys = {"task": "token_classification", "text_field": "words", "label_field": "tags"}
    rows = prepared(tmp_path, WORDS, tokenizer=where, **{**keys, "sequence_length": most})
    theirs = AutoTokenizer.from_pretrained(where, add_prefix_space=True)
    found = rows.collate(np.arange(3))
    for number, row in enumerate(WORDS):
        ids, classes = aligned(theirs, row["words"], row["tags"], most)
        assert found["input_ids"][number, : len(ids)].tolist() == ids
        assert found["targets"][number, : len(ids)].tolist() == classes
        assert rows.counts[number] == sum(one != IGNORED for one in classes)
        assert found["attention_mask"][number].sum() == len(ids)
    assert rows.manifest.classes == 3


def test_words_of_bytes(tmp_path: Path) -> None:
    """A space between words; the first byte of each has its class."""
    keys = {"task": "token_classification", "text_field": "words", "label_field": "tags"}
    rows = prepared(tmp_path, [{"words": ["ab", "c"], "tags": ["I-X", "O"]}], label_names=["O", "B-X", "I-X"], **keys)  # fmt: skip
    found = rows.collate(np.array([0]))
    assert bytes(found["input_ids"][0].tolist()) == b"ab c"
    assert found["targets"][0].tolist() == [2, IGNORED, IGNORED, 0]
    assert rows.manifest.classes == 3


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        ({"words": ["a", "b"], "tags": [0]}, {}, "tags: 1 classes of 2 words"),
        ({"words": "a b", "tags": [0, 1]}, {}, "no list of words in column 'words'; it holds str"),
        ({"tokens": ["a"], "tags": [0]}, {}, "this row has: tokens, tags"),
        ({"words": ["a"], "tags": 0}, {}, "tags: 0 is no list of classes"),
        ({"words": ["a"], "tags": [-1]}, {}, "-1 is not a class number"),
        ({"words": ["a"], "tags": [True]}, {}, "True is not a class number"),
        ({"words": ["a"], "tags": ["B-X"]}, {}, "data.label_names=[O, B-PER, I-PER, …]"),
        ({"words": ["a"], "tags": ["B-Y"]}, {"label_names": ["O", "B-X"]}, "'B-Y' is none of data.label_names: O, B-X"),
        ({"words": ["a"], "tags": [2]}, {"label_names": ["O", "B-X"]}, "class 2, and data.label_names has 2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_labelled_row_is_refused(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    """With file and line, before anything is written."""
    task = {"task": "token_classification", "text_field": "words", "label_field": "tags"}
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [row], **task, **keys)
    told = str(caught.value)
    assert "line 1: " in told
    assert words in (heard(words, told) if "Nearest" in told else told)


def test_names_that_are_missing_can_be_stated(tmp_path: Path) -> None:
    """What the message asks for is enough."""
    keys = {"task": "token_classification", "text_field": "words", "label_field": "tags"}
    row = {"words": ["a"], "tags": ["B-PER"]}
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [row], **keys)
    heard("is a name, and data.label_names does not say which number it has", str(caught.value))
    rows = prepared(tmp_path, [row], label_names=["O", "B-PER", "I-PER"], **keys)
    assert rows.collate(np.array([0]))["targets"].tolist() == [[1]]


TEXTS = [{"text": " ".join("abcdefgh"[(n + k) % 8] * (k % 3 + 1) for k in range(3 + n % 9))} for n in range(40)]  # fmt: skip


def masked(folder: Path, **keys: Any) -> Rows:
    return prepared(folder, TEXTS, task="masked_lm", tokenizer=masked_bert(folder / "t"), **keys)


@pytest.mark.parametrize("packing", ["stream", "none"])
def test_masks_follow_from_the_sample_alone(tmp_path: Path, packing: str) -> None:
    """Any micro-batches give the same; another slot, which is another epoch, gives others."""
    rows = masked(tmp_path, packing=packing)
    indices = np.arange(len(rows))
    seeds = draw_seeds(5, indices)
    whole = rows.collate(indices, seeds)
    for start in range(0, len(rows), 3):
        part = rows.collate(indices[start : start + 3], seeds[start : start + 3])
        for name, values in part.items():
            width = values.shape[1]
            assert np.array_equal(values, whole[name][start : start + 3, :width]), name
    again = rows.collate(indices, draw_seeds(5, indices + len(rows)))
    assert (again["targets"] != whole["targets"]).any(axis=1).mean() > 0.8


@pytest.mark.parametrize("packing", ["stream", "none"])
@pytest.mark.parametrize("share", [0.15, 0.6])
def test_what_is_masked(tmp_path: Path, packing: str, share: float) -> None:
    """The stated share of each row, never a special token; 80 % masked, 10 % any token, 10 % kept."""
    rows = masked(tmp_path, packing=packing, mask_probability=share)
    indices = np.arange(len(rows))
    plain, inside = rows.tokens(indices)
    fates = {"masked": 0, "kept": 0, "other": 0}
    for epoch in range(60):
        found = rows.collate(indices, draw_seeds(1, indices + epoch * len(rows)))
        chosen = found["targets"] != IGNORED
        assert np.array_equal(chosen.sum(axis=1), rows.counts)
        assert np.array_equal(found["targets"][chosen], plain[chosen])
        assert (plain[chosen] > 4).all() or (plain[chosen] == 4).any()
        assert not np.isin(plain[chosen], [0, 1, 2, 3, 4]).any()
        same = found["input_ids"] == plain * inside
        assert same[~chosen].all()
        fates["masked"] += int((found["input_ids"][chosen] == 4).sum())
        fates["kept"] += int(same[chosen].sum())
        fates["other"] += int((~same[chosen] & (found["input_ids"][chosen] != 4)).sum())
    total = sum(fates.values())
    assert fates["masked"] / total == pytest.approx(0.8, abs=0.02)
    assert fates["kept"] / total == pytest.approx(0.105, abs=0.02)
    free = inside & ~np.isin(plain, [0, 1, 2, 3, 4])
    assert rows.counts.tolist() == [max(1, round(share * int(n))) for n in free.sum(axis=1)]


def test_a_stream_has_marks_around_each_document(tmp_path: Path) -> None:
    """Rows are full but for the last one, and laid end to end they are [CLS] … [SEP] of each text."""
    rows = masked(tmp_path)
    plain, inside = rows.tokens(np.arange(len(rows)))
    assert (inside.sum(axis=1)[:-1] == 16).all()
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    wanted = [token for row in TEXTS for token in theirs(row["text"]).input_ids]
    assert plain[inside].tolist() == wanted


def test_samples_end_a_masked_stream(tmp_path: Path) -> None:
    """As many rows as data.samples says, of the first documents."""
    rows, few = masked(tmp_path / "a"), masked(tmp_path / "b", samples=5)
    assert len(few) == 5
    assert np.array_equal(few.tokens(np.arange(5))[0], rows.tokens(np.arange(5))[0])


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    """With those that have one; causal_lm needs none."""
    where = llama(tmp_path / "t")
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, TEXTS, task="masked_lm", tokenizer=where)
    heard("has no mask token", str(caught.value))
    assert len(prepared(tmp_path, TEXTS, task="causal_lm", tokenizer=where)) > 1


def test_a_tokenizer_without_places_is_refused(tmp_path: Path) -> None:
    """A slow one; a fast one says which word a token is of."""
    CanineTokenizer().save_pretrained(tmp_path / "slow")
    keys = {"task": "token_classification", "text_field": "words", "label_field": "tags"}
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, WORDS, tokenizer=str(tmp_path / "slow"), **keys)
    heard("it does not say which word a token is of", str(caught.value))
    assert len(prepared(tmp_path, WORDS, tokenizer=bert(tmp_path / "fast"), **keys)) == 3


def test_texts_to_be_written(tmp_path: Path) -> None:
    """Both texts as the tokenizer encodes them, each cut at its own length, padding ignored."""
    where = masked_bert(tmp_path / "t")
    texts = [
        {"prompt": "aa bb cc dd", "completion": "a b"},
        {"prompt": "c", "completion": "d e f g h"},
    ]
    rows = prepared(
        tmp_path, texts, task="seq2seq", tokenizer=where, sequence_length=8, target_length=5
    )
    theirs = AutoTokenizer.from_pretrained(where)
    found = rows.collate(np.array([1, 0]))
    for place, row in enumerate(reversed(texts)):
        read = theirs(row["prompt"], truncation=True, max_length=8).input_ids
        written = theirs(row["completion"], truncation=True, max_length=5).input_ids
        assert found["input_ids"][place, : len(read)].tolist() == read
        assert found["attention_mask"][place].sum() == len(read)
        assert found["targets"][place, : len(written)].tolist() == written
        assert (found["targets"][place, len(written) :] == IGNORED).all()
    assert rows.counts.tolist() == [4, 5]
    assert (rows.manifest.truncated, rows.manifest.longest) == (2, 8)
    wide = rows.task.widen(found, rows.manifest)
    assert wide["input_ids"].shape == (2, 8)
    assert wide["targets"].shape == (2, 5)
