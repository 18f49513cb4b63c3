"""Tokenising in batches on all cores gives the tokens and the order of one text at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from data.test_tokenizers import bert, llama
from drumline.data import tokenize_ahead
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.data.source_row import SourceRow
from drumline.data.tasks import find_task
from drumline.data.tokenize_ahead import TokenizeAhead
from drumline.data.tokenizers import HubTokenizer, Request
from drumline.errors import DataError
from drumline.recipe.data_section import Data

TEXTS = st.lists(
    st.sampled_from(
        ["the", " cat", "answer:", "yes", "</s>", "<s>", "[SEP]", "é", "\n", " ", "🙂"]
    ),
    max_size=12,
).map("".join)
REQUESTS = st.lists(
    st.one_of(
        st.tuples(st.just("encode"), TEXTS),
        st.tuples(st.just("encode_pair"), TEXTS, TEXTS),
        st.tuples(
            st.just("encode_row"), TEXTS, st.sampled_from([None, 5, 9]), st.one_of(st.none(), TEXTS)
        ),
    ),
    max_size=9,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HubTokenizer]:
    """Fast ones with and without special tokens, and one in Python."""
    folder = tmp_path_factory.mktemp("tokenizers")
    ByT5Tokenizer().save_pretrained(folder / "byt5")
    made = {"bert": bert(folder / "bert"), "llama": llama(folder / "llama")}
    found = {name: HubTokenizer(where, needs_end=False) for name, where in made.items()}
    found["marked"] = HubTokenizer(made["llama"], needs_end=False, is_marked=True)
    found["byt5"] = HubTokenizer(str(folder / "byt5"))
    assert not found["byt5"].is_fast
    return found


def plain(answer: Any) -> Any:
    """Arrays as lists, so that answers can be compared."""
    if isinstance(answer, tuple):
        return tuple(map(plain, answer))
    return answer.tolist() if isinstance(answer, np.ndarray) else answer


@given(requests=REQUESTS)
@settings(max_examples=150, deadline=None)
def test_batches_are_single_texts(
    tokenizers: dict[str, HubTokenizer], requests: list[Request]
) -> None:
    """Every kind of request, in any mixture, cut or not, with the names of special tokens in the text."""
    for tokenizer in tokenizers.values():
        single = [getattr(tokenizer, method)(*rest) for method, *rest in requests]
        assert plain(tuple(tokenizer.answers(requests))) == plain(tuple(single))


def data_of(folder: Path, tokenizer: str, task: str, texts: int) -> Data:
    path = folder / f"{task}.jsonl"
    rows = [
        {"text": "the cat " * (n % 7 + 1), "prompt": "answer:", "completion": "yes" * (n % 5 + 1), "label": n % 2}
        for n in range(texts)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(source="files", path=str(path), task=task, tokenizer=tokenizer, sequence_length=16)


@pytest.mark.parametrize("task", ["causal_lm", "sft", "classification"])
@pytest.mark.parametrize("name", ["llama", "byt5"])
def test_chunks_and_processes_change_nothing(
    tokenizers: dict[str, HubTokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    task: str,
) -> None:
    """Chunks of three rows, with processes for the tokenizer in Python: the same fingerprint."""
    data = data_of(tmp_path, tokenizers[name].made_of[0], task, 20)
    found = []
    for rows in (1000, 3):
        monkeypatch.setenv("DRUMLINE_CACHE", str(tmp_path / f"cache-{rows}"))
        monkeypatch.setattr(tokenize_ahead, "_MOST_ROWS", rows)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
        manifest = read_dataset_manifest(prepare(data, None))
        assert manifest
        found.append(manifest.fingerprint)
    assert found[0] == found[1]


def test_a_task_that_asks_otherwise_is_answered(tokenizers: dict[str, HubTokenizer]) -> None:
    """What was not asked ahead is tokenised when it is asked."""
    ahead, own = TokenizeAhead(tokenizers["llama"]), tokenizers["llama"]
    task = find_task(Data(source="files", path="/x", task="causal_lm", sequence_length=9), None)
    rows = [SourceRow({"text": "the cat"}, "row 1"), SourceRow({"text": "the mat"}, "row 2")]
    for given_row, row in zip(ahead.rows(task, rows), rows, strict=True):
        assert given_row is row
        assert plain(ahead.encode(row.fields["text"])) == plain(own.encode(row.fields["text"]))
        assert plain(ahead.encode("no")) == plain(own.encode("no"))
        assert plain(ahead.encode_row("no", 3)) == plain(own.encode_row("no", 3))


def test_a_bad_row_in_a_chunk_is_named(tokenizers: dict[str, HubTokenizer], tmp_path: Path) -> None:
    """Its line, though the rows around it are tokenised together."""
    data = data_of(tmp_path, tokenizers["llama"].made_of[0], "causal_lm", 5)
    path = Path(str(data.path))
    lines = path.read_text().splitlines()
    lines[3] = '{"txt": 1}'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"causal_lm.jsonl, line 4: .*text"):
        prepare(data, None)


@pytest.mark.parametrize("task", ["causal_lm", "sft", "classification"])
def test_samples_stop_before_a_source_fails(
    tokenizers: dict[str, HubTokenizer], tmp_path: Path, task: str
) -> None:
    """What a project's code raises after the last row that is needed, in the same chunk, is no error."""
    (tmp_path / "rows.py").write_text(
        "def rows():\n"
        "    for n in range(40):\n"
        "        yield {'text': 'the cat', 'prompt': 'the', 'completion': 'cat', 'label': n % 2}\n"
        "    raise OSError('the disk is gone')\n"
    )
    data = Data(
        source="factory",
        factory="rows:rows",
        task=task,
        tokenizer=tokenizers["llama"].made_of[0],
        sequence_length=4,
        validation_split="drawn",
        samples=18,
    )
    manifest = read_dataset_manifest(prepare(data, str(tmp_path)))
    assert manifest
    assert manifest.samples == 18
    with pytest.raises(DataError, match="the disk is gone"):
        prepare(data.model_copy(update={"samples": 60}), str(tmp_path))
