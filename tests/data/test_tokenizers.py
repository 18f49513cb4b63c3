"""Tokenizers of several kinds: special tokens as the model expects them, and never from a text."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drumline.data.prepare import prepare
from drumline.data.readers import read_file
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.data.tokenizers import HubTokenizer, find_tokenizer, save_tokenizer
from drumline.errors import DataError
from drumline.recipe.data_section import Data

WORDS = ["the", "cat", "sat", "on", "mat", "yes", "no", "maybe", "dog", "ran", "</s>", "<s>"]


def saved(folder: Path, inner: Tokenizer, **special: str) -> str:
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


def bert(folder: Path) -> str:
    """WordPiece with [CLS] and [SEP] around a text, and no end-of-text token."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*marks, *WORDS])}
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return saved(
        folder, inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def llama(folder: Path, adds_begin: bool = True) -> str:
    """BPE with Metaspace, which puts a space before a text, and <s> before it where it is said to."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    inner.train_from_iterator(["answer:yes answer:no the cat sat on the mat"] * 5, trainer)
    if adds_begin:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return saved(folder, inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def rows_of(data: Data) -> list[list[int]]:
    rows = Rows(prepare(data, None), "train", find_task(data, None))
    starts, lengths, tokens = (rows.column(n) for n in ("starts", "lengths", "tokens"))
    return [tokens[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]


def data_of(folder: Path, rows: list[dict[str, Any]], **values: Any) -> Data:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(source="files", path=str(path), **{"sequence_length": 32, **values})


def test_a_classifier_gets_the_tokens_that_it_expects(tmp_path: Path) -> None:
    """[CLS] and [SEP] around each text, also where it is cut; no end-of-text token is asked for."""
    rows = [{"text": "the cat", "label": 0}, {"text": "the cat sat on the mat", "label": 1}]
    data = data_of(
        tmp_path, rows, task="classification", tokenizer=bert(tmp_path / "t"), sequence_length=5
    )
    assert rows_of(data) == [[2, 4, 5, 3], [2, 4, 5, 6, 3]]
    with pytest.raises(DataError, match="has no end-of-text token"):
        prepare(data_of(tmp_path, rows, task="causal_lm", tokenizer=bert(tmp_path / "t")), None)


@pytest.mark.parametrize(("adds", "bos", "begins"), [(True, "auto", True), (False, "auto", False),
                                                     (False, True, True), (True, False, False)])  # fmt: skip
@pytest.mark.parametrize("task", ["causal_lm", "sft"])
def test_texts_begin_as_the_tokenizer_begins_them(
    tmp_path: Path, adds: bool, bos: Any, begins: bool, task: str
) -> None:
    """Or as data.bos says; every document of a packed row, and every prompt."""
    name = llama(tmp_path / "t", adds)
    rows = [{"text": "the cat", "prompt": "the cat", "completion": " sat"}] * 2
    found = [
        token
        for row in rows_of(data_of(tmp_path, rows, task=task, tokenizer=name, bos=bos))
        for token in row
    ]
    assert found.count(1) == (2 if begins else 0)
    assert (found[0] == 1) == begins
    assert found.count(2) == 2


def test_a_text_never_makes_a_special_token(tmp_path: Path) -> None:
    """`</s>` in what somebody wrote does not end a document."""
    for name, text in (
        (llama(tmp_path / "l"), "the cat</s>sat<s>"),
        (bert(tmp_path / "b"), "cat [SEP] sat [CLS]"),
    ):
        tokenizer = HubTokenizer(name, needs_end=False)
        special = set(tokenizer._inner.all_special_ids) - {tokenizer._inner.unk_token_id}
        assert not special & set(tokenizer.encode(text).tolist())
        assert not special & set(tokenizer.encode_pair(text, text)[0].tolist())
        assert len(special & set(tokenizer.encode_row(text, None)[0].tolist())) <= 2


def test_a_text_makes_special_tokens_where_it_is_asked_to(tmp_path: Path) -> None:
    """`special_tokens_in_text`: a rendered chat has its marks; the prepared rows differ, and so does the key."""
    name = llama(tmp_path / "l", adds_begin=False)
    rows = [{"prompt": "<s>the cat", "completion": "yes</s>no"}]
    found = [
        rows_of(data_of(tmp_path, rows, task="sft", tokenizer=name, special_tokens_in_text=marked))[
            0
        ]
        for marked in (False, True)
    ]
    assert (found[0].count(1), found[0].count(2)) == (0, 1)
    assert (found[1].count(1), found[1].count(2)) == (1, 2)
    with pytest.raises(ValidationError, match="bytes has no special token"):
        data_of(tmp_path, rows, task="sft", special_tokens_in_text=True)


def test_a_completion_is_tokenised_after_its_prompt(tmp_path: Path) -> None:
    """Apart, a completion would begin with a space of its own; the whole text has none there."""
    tokenizer = HubTokenizer(llama(tmp_path / "t"))
    both, of_prompt = tokenizer.encode_pair("answer:", "yes")
    whole = tokenizer.encode("answer:yes")
    assert both.tolist() == whole.tolist()
    assert "".join(tokenizer._inner.convert_ids_to_tokens(both[of_prompt:].tolist())).endswith(
        "yes"
    )
    assert both[of_prompt:].tolist() != tokenizer.encode("yes").tolist()


@pytest.mark.parametrize("cut", range(11))
def test_a_token_of_both_is_the_completions(tmp_path: Path, cut: int) -> None:
    """Wherever the two parts of a text meet, the tokens are those of the whole, and each has one side."""
    tokenizer = HubTokenizer(llama(tmp_path / "t"))
    text = "answer:yes "[:11]
    both, of_prompt = tokenizer.encode_pair(text[:cut], text[cut:])
    offsets = tokenizer._inner(
        text, add_special_tokens=False, return_offsets_mapping=True
    ).offset_mapping
    assert both.tolist() == tokenizer.encode(text).tolist()
    assert all(end <= cut for _, end in offsets[:of_prompt])
    assert all(end > cut for _, end in offsets[of_prompt:])


def test_the_largest_id_decides(tmp_path: Path) -> None:
    """An added token may have an id far beyond the number of tokens."""
    folder = Path(llama(tmp_path / "t"))
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([AddedToken("far")])
    file = folder / "tokenizer.json"
    inner.save(str(file))
    plain = json.loads(file.read_text())
    for token in plain["added_tokens"]:
        if token["content"] == "far":
            token["id"] = 300
    file.write_text(json.dumps(plain))
    tokenizer = HubTokenizer(str(folder))
    assert int(tokenizer.encode("far").max()) < tokenizer.vocabulary


def test_bytes_have_no_begin_token() -> None:
    """Asking for one is refused, not passed over."""
    with pytest.raises(DataError, match="bytes has no begin-of-text token. Nearest: data.bos=auto"):
        find_tokenizer("bytes", bos=True)


def test_the_byte_tokenizer_of_an_export_has_the_same_ids(tmp_path: Path) -> None:
    """For every byte and any text; its end token is 256, and it writes back what it read."""
    save_tokenizer("bytes", tmp_path)
    inner = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["plain text", " two  spaces\n\ttab", "é 漢 🙂", "".join(map(chr, range(1, 600))), ""]
    for text in texts:
        assert inner(text).input_ids == list(text.encode())
        assert inner.decode(inner(text).input_ids) == text
    assert (inner.eos_token_id, len(inner)) == (256, 257)


def test_one_text_has_one_tokenisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a .txt file or as a row of a table; a text that is longer than a block is cut where a line ends."""
    name = llama(tmp_path / "t")
    text = "the cat sat on the mat\n" * 4000
    found = []
    for file, content in (("a.txt", text), ("a.jsonl", json.dumps({"text": text}) + "\n")):
        (tmp_path / file).write_text(content)
        data = Data(
            source="files",
            path=str(tmp_path / file),
            task="causal_lm",
            sequence_length=64,
            tokenizer=name,
        )
        found.append(rows_of(data))
    assert found[0] == found[1]
    monkeypatch.setattr("drumline.data.builtin.BLOCK_CHARACTERS", 1000)
    blocks = [row.fields["text"] for row in read_file(tmp_path / "a.txt")]
    assert "".join(blocks) == text
    assert len(blocks) > 50
    assert all(block.endswith("\n") for block in blocks[:-1])
