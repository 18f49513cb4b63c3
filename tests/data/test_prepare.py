"""Preparing data: packed rows, counts, fingerprints, and nothing half-written."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advice import heard
from conftest import SOURCES, tiny_recipe
from drumline.data.cache import cache_folder, cache_root
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.data.rows import Rows
from drumline.data.tasks import IGNORED, find_task
from drumline.errors import DataError
from drumline.recipe.data_section import Data
from drumline.recipe.load import validate


def files(path: Path | list[Path], **changes: Any) -> Data:
    where = [str(p) for p in path] if isinstance(path, list) else str(path)
    values = {"source": "files", "path": where, "task": "causal_lm", "sequence_length": 16}
    return Data(**{**values, **changes})


def card_of(data: Data) -> Any:
    return read_dataset_manifest(prepare(data, None))


def all_targets(rows: Rows) -> list[int]:
    targets = rows.collate(np.arange(len(rows)))["targets"].ravel()
    return [int(t) for t in targets if t != IGNORED]


def test_packing_makes_every_token_a_target_once(tmp_path: Path) -> None:
    """Documents end to end; only the first token of the stream is never a target."""
    texts = ["hello world, this is text", "zweites Dokument äöü", "x" * 40]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    data = files(tmp_path / "*.txt")
    rows = Rows(prepare(data, None), "train", find_task(data, None))
    stream = [token for text in texts for token in [*text.encode(), 256]]
    assert all_targets(rows) == stream[1:]
    assert len(rows) == -(-(len(stream) - 1) // 16)
    assert rows.counts.sum() == len(stream) - 1
    batch = rows.collate(np.array([1]))
    assert batch["input_ids"][0].tolist() == stream[16:32]
    assert batch["targets"][0].tolist() == stream[17:33]


def test_a_text_larger_than_a_block_stays_one_document(tmp_path: Path) -> None:
    """Blocks are a matter of memory: no end-of-document inside a file."""
    (tmp_path / "big.txt").write_text("ab\n" * 60_000)
    data = files(tmp_path / "big.txt", sequence_length=1000)
    rows = Rows(prepare(data, None), "train", find_task(data, None))
    targets = all_targets(rows)
    assert len(targets) == 180_000
    assert targets.count(256) == 1
    assert targets[-1] == 256


def test_the_fingerprint_is_of_content_not_of_paths(tmp_path: Path) -> None:
    """The same text elsewhere has the same fingerprint; another byte or length has not."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("some text to be read" * 3)
    a, b = (card_of(files(tmp_path / name / "*.txt")) for name in ("a", "b"))
    assert a.fingerprint == b.fingerprint
    assert card_of(files(tmp_path / "a/*.txt", sequence_length=8)).fingerprint != a.fingerprint
    time.sleep(0.01)
    (tmp_path / "a/a.txt").write_text("some text to be reaD" * 3)
    assert card_of(files(tmp_path / "a/*.txt")).fingerprint != a.fingerprint


def test_the_same_rows_from_txt_jsonl_csv_and_parquet(tmp_path: Path) -> None:
    """Four formats of the same documents have one fingerprint."""
    import pyarrow
    from pyarrow import parquet

    texts = [f'document {n}\nwith, "quotes" and ünïcode {"x" * n}' for n in range(9)]
    for number, text in enumerate(texts):
        (tmp_path / f"d{number}.txt").write_text(text)
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts)
    )
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([t] for t in texts)])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    names = ["d?.txt", "d.jsonl", "d.csv", "d.parquet"]
    cards = [card_of(files(tmp_path / name, validation=0.25)) for name in names]
    assert len({manifest.fingerprint for manifest in cards}) == 1
    assert cards[0].samples > 0
    assert cards[0].validation_samples > 0


def test_sft_counts_only_the_completion(tmp_path: Path) -> None:
    """Prompt tokens are inputs, never targets; rows are of unequal length; long ones are cut, and told."""
    pairs = [("question", "answer"), ("q", "a much longer answer"), ("x" * 30, "never seen")]
    text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)
    (tmp_path / "s.jsonl").write_text(text)
    data = files(tmp_path / "s.jsonl", task="sft")
    folder = prepare(data, None)
    rows, manifest = Rows(folder, "train", find_task(data, None)), read_dataset_manifest(folder)
    assert manifest
    assert (len(rows), manifest.truncated, manifest.dropped) == (2, 2, 1)
    assert rows.counts.tolist() == [7, 16]
    batch = rows.collate(np.array([0, 1]))
    kept = [[int(t) for t in row if t != IGNORED] for row in batch["targets"]]
    assert kept == [[*b"answer", 256], [*b"a much longer an"]]
    assert batch["targets"].shape == (2, 16)
    assert rows.collate(np.array([0]))["targets"].shape == (1, 14)


def test_validation_is_an_exact_share(tmp_path: Path) -> None:
    """floor(n × validation) documents, spread evenly; none is an error with the nearest fix."""
    text = "".join(json.dumps({"text": str(n), "label": n % 3}) + "\n" for n in range(50))
    (tmp_path / "c.jsonl").write_text(text)
    data = files(tmp_path / "c.jsonl", task="classification", validation=0.3)
    manifest = card_of(data)
    assert (manifest.samples, manifest.validation_samples, manifest.classes) == (35, 15, 3)
    with pytest.raises(
        DataError, match=r"0.001 × 50 documents = 0.05, which is none. Nearest: validation 0.02"
    ):
        prepare(files(tmp_path / "c.jsonl", task="classification", validation=0.001), None)


@pytest.mark.parametrize("documents", [2, 3, 7, 11, 30, 99, 101, 333])
def test_the_nearest_validation_works_when_followed(tmp_path: Path, documents: int) -> None:
    """It is rounded up, so that a whole run of documents is there."""
    rows = "".join(json.dumps({"text": str(n), "label": n % 2}) + "\n" for n in range(documents))
    (tmp_path / "c.jsonl").write_text(rows)
    with pytest.raises(DataError, match="which is none") as refused:
        prepare(files(tmp_path / "c.jsonl", task="classification", validation=1e-5), None)
    nearest = float(str(refused.value).split("Nearest: validation ")[1].split()[0])
    followed = files(tmp_path / "c.jsonl", task="classification", validation=nearest)
    assert card_of(followed).validation_samples == 1


def test_builtin_source_names_the_python_version() -> None:
    """The fingerprint of Python's own source begins with its version."""
    data = Data(source="builtin", name="python-stdlib", task="causal_lm", sequence_length=64,
                options={"max_files": 5})  # fmt: skip
    version = ".".join(map(str, sys.version_info[:3]))
    assert card_of(data).fingerprint.startswith(f"cpython-{version}:")
    with pytest.raises(DataError, match="'stdlib' is not builtin. Known: python-stdlib"):
        prepare(Data(source="builtin", name="stdlib", task="causal_lm", sequence_length=64), None)


def test_a_local_transformers_tokenizer(tmp_path: Path) -> None:
    """A tokenizer folder is used through transformers; its vocabulary sets the token type."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(
        tmp_path / "tok"
    )
    (tmp_path / "t.txt").write_text("a b c a")
    data = files(tmp_path / "t.txt", tokenizer=str(tmp_path / "tok"))
    assert all_targets(Rows(prepare(data, None), "train", find_task(data, None))) == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: files(p / "none.txt"), "none.txt does not exist"),
        (lambda p: files(p / "*.none"), r"\*.none matches no file"),
        (lambda p: files(p / "nothing"), "holds no file of a known format"),
        (lambda p: files(p / "empty.txt"), r"empty.txt is empty \(0 bytes\)"),
        (lambda p: files(p / "x.bin"), r".bin is not a known format"),
        (lambda p: files(p / "latin.txt"), "latin.txt is not UTF-8 text"),
        (lambda p: files(p / "bad.jsonl"), "bad.jsonl, line 2: not JSON"),
        (lambda p: files(p / "good.jsonl"), "no text in column 'text'; this row has: words"),
        (lambda p: files(p / "x.bin", tokenizer=str(p / "no")), "not a known format"),
        (lambda p: files(p / "ok.txt", tokenizer=str(p / "no")), "/no is not a folder"),
        (lambda p: files(p / "void.jsonl"), "1 documents gave no training rows"),
    ],
)
def test_bad_input_has_one_clear_message(tmp_path: Path, make: Any, message: str) -> None:
    """Missing, empty, foreign and broken files are each named; nothing stays in the cache."""
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x.bin").write_bytes(b"1")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "good.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "ok.txt").write_text("text")
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')
    data = make(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(data, None)
    if (
        "exist" not in message
        and "match" not in message
        and "folder" not in message
        and "format" not in message
        and "holds no file" not in message
    ):
        key = cache_folder(data, None).name
        assert not list((cache_root() / "data").glob(f"*{key}*"))


def test_a_killed_prepare_leaves_no_half_cache(tmp_path: Path) -> None:
    """SIGKILL in the middle: the key does not exist, and the next prepare cleans up and succeeds."""
    (tmp_path / "t.txt").write_text("line of text\n" * 2000)
    program = (
        "import sys, time; from pathlib import Path; from drumline.recipe.data_section import Data\n"
        "from drumline.data import prepare\n"
        "def slow(documents, tokens, share): print('at', flush=True); time.sleep(60)\n"
        f"data = Data(source='files', path={str(tmp_path / 't.txt')!r}, task='causal_lm', sequence_length=16)\n"
        "prepare.prepare(data, None, slow)\n"
    )
    env = {**os.environ, "PYTHONPATH": SOURCES}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"at\n"
    data = files(tmp_path / "t.txt")
    final = cache_folder(data, None)
    half = list(final.parent.glob(f".{final.name}.*"))
    assert len(half) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not final.exists()
    os.utime(half[0], (0, 0))
    assert read_dataset_manifest(prepare(data, None))
    assert not list(final.parent.glob(f".{final.name}.*"))


def test_two_prepares_at_once_agree(tmp_path: Path) -> None:
    """Four at the same moment: one result, no error, nothing left over."""
    (tmp_path / "t.txt").write_text("line of text\n" * 3000)
    data = files(tmp_path / "t.txt", sequence_length=8)
    barrier, found = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        found.append(prepare(data, None))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert not list(found[0].parent.glob(f".{found[0].name}.*"))


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Preparing 64 MB takes no more memory than 4 MB, give or take 24 MB (peak resident size)."""
    program = (
        "import re, sys; from drumline.recipe.data_section import Data; from drumline.data.prepare import prepare\n"
        "prepare(Data(source='files', path=sys.argv[1], task='causal_lm', sequence_length=512), None)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    peaks = []
    for megabytes in (4, 64):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(("0123456789abcde\n" * 65536) * megabytes)
        env = {**os.environ, "PYTHONPATH": SOURCES}
        out = subprocess.run(
            [sys.executable, "-c", program, str(path)], env=env, capture_output=True, check=True
        )
        peaks.append(int(out.stdout) / 1024)
    assert peaks[1] < peaks[0] + 24


def test_a_factory_of_the_recipe_s_own_project(tmp_path: Path) -> None:
    """Rows from a function beside the recipe; another content of the file is another cache key."""
    code = "def rows(n):\n    for i in range(n):\n        yield {'features': [i, 2 * i], 'label': i % 2}\n"
    (tmp_path / "mine.py").write_text(code)
    data = Data(source="factory", factory="mine:rows", task="classification", options={"n": 6})
    folder = prepare(data, str(tmp_path))
    batch = Rows(folder, "train", find_task(data, str(tmp_path))).collate(np.array([2, 5]))
    assert batch["features"].tolist() == [[2, 4], [5, 10]]
    assert batch["targets"].tolist() == [0, 1]
    (tmp_path / "mine.py").write_text(code.replace("2 * i", "3 * i"))
    assert cache_folder(data, str(tmp_path)) != folder
    with pytest.raises(DataError, match="mine.py has no function 'other'"):
        prepare(data.model_copy(update={"factory": "mine:other"}), str(tmp_path))
    with pytest.raises(DataError, match="factories lie beside the recipe"):
        prepare(data.model_copy(update={"factory": "os:listdir"}), str(tmp_path))


def test_the_hub_without_a_network_is_one_message(tmp_path: Path) -> None:
    """Offline and not in the cache: named, with the way out, which is taken."""
    data = Data(source="hub", name="nobody/nothing", task="causal_lm", sequence_length=8)
    with pytest.raises(
        DataError, match=r"nobody/nothing \(split train\) cannot be loaded"
    ) as caught:
        prepare(data, None)
    heard("or use source files", str(caught.value))
    (tmp_path / "t.txt").write_text("line of text\n" * 300)
    prepare(files(tmp_path / "t.txt"), None)


def test_a_damaged_cache_is_prepared_again(tmp_path: Path) -> None:
    """A missing or shortened array is seen, and the next prepare mends it."""
    (tmp_path / "t.txt").write_text("line of text\n" * 300)
    data = files(tmp_path / "t.txt")
    folder = prepare(data, None)
    fingerprint = card_of(data).fingerprint
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-4])):
        damage(folder / "train" / "starts.bin")
        assert read_dataset_manifest(folder) is None
        assert card_of(data).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "data.factory: mine:rows: KeyError: 'x'"),
        ("return None", "TypeError: 'NoneType'"),
        ("return [1]", "a row is a mapping, not int"),
        ("return [{'label': 1}]", "no text in column 'text'"),
        ("return [{'features': [1, 'a'], 'label': 1}]", "row 1: features: could not convert"),
        (
            "return [{'features': [float('nan')], 'label': 1}]",
            "row 1: features are empty or not finite",
        ),
        ("return [{'features': [1.0], 'label': -1}]", "-1 is not a class number"),
        (
            "return [{'features': [1.0], 'label': 1}, {'features': [1.0, 2.0], 'label': 1}]",
            r"of shape \[2\]",
        ),
    ],
)
def test_what_a_data_factory_does_wrong_is_told(tmp_path: Path, body: str, message: str) -> None:
    """Its exceptions and its malformed rows are each one message."""
    (tmp_path / "mine.py").write_text(f"def rows():\n    {body}\n")
    data = Data(source="factory", factory="mine:rows", task="classification")
    with pytest.raises(DataError, match=message):
        prepare(data, str(tmp_path))


def test_names_with_brackets_and_folders_deep(tmp_path: Path) -> None:
    """A file name is never a pattern by accident; ** finds files at any depth."""
    (tmp_path / "a[1].jsonl").write_text('{"text": "some text here"}\n')
    assert card_of(files(tmp_path / "a[1].jsonl")).samples == 1
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/z.txt").write_text("some text here")
    assert card_of(files(tmp_path / "**/*.txt")).samples == 1


def test_new_content_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    """A tool that sets a file's time back does not hide that it was written again."""
    path = tmp_path / "t.txt"
    path.write_text("one text")
    status = path.stat()
    before = cache_folder(files(path), None)
    time.sleep(0.01)
    path.write_text("two text")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert cache_folder(files(path), None) != before


def test_a_plan_tells_how_many_rows_are_cut(tmp_path: Path) -> None:
    """Of prompts with completions longer than a row; not where all fit."""
    from drumline.session.planning import make_plan

    rows = [{"prompt": "ab", "completion": "c" * (5 + 20 * (n % 2))} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for length, told in ((16, True), (64, False)):
        data = {"source": "files", "path": str(tmp_path / "rows.jsonl"), "name": None, "task": "sft", "sequence_length": length,
                "samples": None, "validation": 0.0}  # fmt: skip
        model = {"source": "config", "factory": None, "architecture": "llama", "config": {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}}  # fmt: skip
        recipe = validate(tiny_recipe(model=model, data=data, batch={"weighting": "token"}), "r")
        prepare(recipe.data, None)
        warnings = make_plan(recipe).warnings
        assert (
            any(
                "data: 10 of the prepared rows are cut at sequence_length 16" in one
                for one in warnings
            )
            == told
        )
