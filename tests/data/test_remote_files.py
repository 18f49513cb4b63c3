"""Data behind URLs, by fsspec: the same rows as from local files, and one message for what cannot be read."""

import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from drumline.data.cache import cache_folder
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.data.prepare import prepare
from drumline.errors import DataError
from drumline.plan.identity import recipe_sha256
from drumline.recipe.data_section import Data
from drumline.recipe.load import load_recipe, merge, validate
from plan.test_advice_followed import BASE

ROWS = [{"prompt": f"p{n}", "completion": "word " * (n % 4 + 1)} for n in range(50)]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """The same rows as JSON lines, compressed in two ways, and as Parquet."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(text)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pyarrow.CompressedOutputStream(str(folder / "rows.jsonl.zst"), "zstd") as file:
        file.write(text.encode())
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """A web server that writes no log."""

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server(shelf: Path) -> Iterator[str]:
    """A web server of the shelf on this machine's loopback."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shelf)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()


def data(path: Any, **keys: Any) -> Data:
    return Data.model_validate(
        {"source": "files", "path": path, "task": "sft", "sequence_length": 32, **keys}
    )


def fingerprint(of: Data) -> str:
    found = read_dataset_manifest(prepare(of, None))
    assert found
    return found.fingerprint


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_rows_are_those_of_the_file(shelf: Path, server: str, name: str) -> None:
    """Over HTTP, and as the file itself by its URL."""
    local = fingerprint(data(str(shelf / name)))
    assert fingerprint(data(f"{server}/{name}")) == local
    assert fingerprint(data(f"file://{shelf}/{name}")) == local


def test_patterns_and_folders(shelf: Path) -> None:
    """Sorted, as local ones are; a list may hold both kinds."""
    (shelf / "rows.parquet").unlink()
    both = [str(shelf / "rows.jsonl"), str(shelf / "rows.jsonl.gz"), str(shelf / "rows.jsonl.zst")]
    wanted = fingerprint(data(both))
    assert fingerprint(data(f"file://{shelf}/*")) == wanted
    assert fingerprint(data(f"file://{shelf}")) == wanted
    assert fingerprint(data([both[0], f"file://{both[1]}", both[2]])) == wanted


def test_a_file_that_changes_is_prepared_again(shelf: Path) -> None:
    """Its size and time are part of the key, as the file system tells them."""
    of = data(f"file://{shelf}/rows.jsonl")
    before, key = fingerprint(of), cache_folder(of, None)
    (shelf / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert cache_folder(of, None) != key
    assert fingerprint(of) != before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("SERVER/none.jsonl", "none.jsonl does not exist"),
        ("file://SHELF/*.csv", "matches no file"),
        ("file://SHELF/rows.bin", "does not exist"),
        ("nowhere://bucket/x.jsonl", "nowhere"),
        ("s3://bucket/x.jsonl", "s3fs"),
        ("http://127.0.0.1:9/x.jsonl", "cannot be read: .*|does not exist"),
    ],
)
def test_what_cannot_be_read_is_one_message(shelf: Path, server: str, url: str, words: str) -> None:
    """Missing files, unknown protocols, packages that are not installed, servers that do not answer."""
    of = data(url.replace("SERVER", server).replace("SHELF", str(shelf)))
    with pytest.raises(DataError, match=rf"data\.path: .*({words})"):
        prepare(of, None)


def test_a_recipe_keeps_its_url_and_another_place_is_the_same_recipe(tmp_path: Path) -> None:
    """Relative to no folder; like an absolute path it says where the data lie, not what they are."""
    (tmp_path / "r.yaml").write_text(
        "recipe: r\nschema: 1\nmodel: {source: config, architecture: llama}\n"
        "data: {source: files, path: 's3://bucket/part-*.jsonl', options: {anon: true}, task: causal_lm, sequence_length: 8}\n"
        "batch: {per_device: 1, gpus: 1}\noptimizer: {lr: 1.0e-3}\nduration: {steps: 1}\n"
    )
    assert load_recipe(str(tmp_path / "r.yaml")).data.path == "s3://bucket/part-*.jsonl"
    hashes = {
        recipe_sha256(validate(merge(BASE, {"data": {"path": path}}), "r"))
        for path in ("s3://a/x.jsonl", "gs://b/y.jsonl", "/c/z.jsonl")
    }
    assert len(hashes) == 1
