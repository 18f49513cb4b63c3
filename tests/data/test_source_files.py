"""Rows of files are read as they were written, in every format, or refused with file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import tiny_recipe
from drumline.data.dataset_manifest import read_dataset_manifest
from drumline.data.files import FORMATS, format_of, matching_files
from drumline.data.prepare import prepare
from drumline.data.readers import read_file
from drumline.data.rows import Rows
from drumline.data.source_row import SourceRow
from drumline.data.tasks import find_task
from drumline.errors import DataError
from drumline.recipe.data_section import Data
from drumline.recipe.load import validate
from drumline.session.planning import make_plan

TEXTS = [
    "NA",
    "null",
    "None",
    "True",
    "1.0",
    "007",
    " spaces ",
    "a,b;c",
    'quoted "word"',
    "two\nlines",
    "é 漢 🙂",
    "-",
    "nan",
]
"""What guessing readers change."""
ROWS = [{"prompt": f"p{n}", "completion": text} for n, text in enumerate(TEXTS)]


def written(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """These rows in a file of this format."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = io.StringIO()
    if kind in ("csv", "tsv"):
        table = csv.DictWriter(
            text, list(rows[0]), delimiter="," if kind == "csv" else "\t", lineterminator="\n"
        )
        table.writeheader()
        table.writerows(rows)
    elif kind == "json":
        json.dump(rows, text)
    else:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def sound(path: Path) -> list[SourceRow]:
    """The rows; DataError for the first that cannot be read, as `prepare` raises it."""
    rows = []
    for row in read_file(path):
        if row.problem:
            raise DataError(f"{row.where}: {row.problem}")
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_text_is_what_was_written(tmp_path: Path, kind: str) -> None:
    """No value becomes null, a number or a truth; lines within a field stay."""
    assert [row.fields for row in read_file(written(tmp_path, kind))] == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_has_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    """By its last suffix."""
    plain = written(tmp_path, kind)
    content = plain.read_bytes()
    path = plain.with_name(plain.name + packed)
    if packed == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[packed].compress(content))
    assert [r.fields for r in read_file(path)] == [r.fields for r in read_file(plain)]
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(DataError, match=f"{path.name}"):
        list(read_file(path))


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, kind: str) -> None:
    """Windows editors put one before UTF-8."""
    plain = [row.fields for row in read_file(written(tmp_path, kind))]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.fields for row in read_file(path)] == plain


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,text\n1,2\n", "line 1: 2 columns are named 'text'"),
        ("a.csv", "prompt,completion,source\na,b,c,\n", "line 2: 4 fields, and the header has 3"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3: 1 fields, and the header has 2"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "line 2: 3 fields.*holds a tab"),
        ("a.csv", 'a\n"open\n', "a.csv, line 2: unexpected end of data"),
        ("a.jsonl", '{"a": 1}\n{"a": 1,}\n', "line 2: not JSON"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1: not JSON: the key 'a' stands twice"),
        ("a.jsonl", "[1, 2]\n", "line 1: a row is an object"),
        ("a.json", '[{"a": 1}, 3]', "row 2: a row is an object"),
        ("a.json", '[{"a": 1},]', "a.json: not JSON"),
        ("a.jsonl", "[" * 100_000, "too deep"),
        ("a.parquet", "no", "cannot be read as parquet"),
        ("a.jsonl.gz", "no", "a.jsonl.gz cannot be read"),
    ],
)
def test_what_is_not_what_it_says_is_refused(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    """File and line, and what was found."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        sound(tmp_path / name)


def prepared(path: Path, task: str = "sft", **more: Any) -> Data:
    return Data(
        source="files", path=str(path), task=task, sequence_length=64, tokenizer="bytes", **more
    )  # type: ignore[arg-type]


def tokens_of(data: Data) -> list[list[int]]:
    rows = Rows(prepare(data, None), "train", find_task(data, None))
    starts, lengths, tokens = (rows.column(n) for n in ("starts", "lengths", "tokens"))
    return [tokens[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]


def test_every_format_prepares_the_same_rows(tmp_path: Path) -> None:
    """The same tokens, and so the same fingerprint, whatever the file."""
    fingerprints = set()
    for kind in ("jsonl", "json", "csv", "tsv", "parquet"):
        data = prepared(written(tmp_path, kind))
        assert tokens_of(data)[0] == [*b"p0NA", 256]
        manifest = read_dataset_manifest(prepare(data, None))
        assert manifest
        fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": None}, "line 2: data.completion_field: no text in column 'completion'; it is null"),
        ({"prompt": "a"}, "line 2: data.completion_field: .* this row has: prompt"),
        ({"prompt": "a", "completion": 3}, "line 2: .*it holds int 3"),
        ({"prompt": "a", "completion": {"b": "c"}}, "line 2: .*it holds dict"),
    ],
)  # fmt: skip
def test_a_bad_row_says_where_it_stands(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    """Null and missing are told apart; the file and its line are named."""
    path = written(tmp_path, "jsonl", [{"prompt": "p", "completion": "c"}, row])
    with pytest.raises(DataError, match=rf"rows.jsonl, {words}"):
        prepare(prepared(path), None)


def test_names_of_ours_never_meet_the_users_columns(tmp_path: Path) -> None:
    """Columns named ends, features, type or message mean nothing unless the recipe names them."""
    plain = [{"text": "first"}, {"text": "second"}]
    more = [
        {**row, "ends": 0, "features": "blue", "type": "x", "message": "y", "where": 1}
        for row in plain
    ]
    found = {
        task: [
            tokens_of(prepared(written(tmp_path / kind, "jsonl", rows), task))
            for kind, rows in cases
        ]
        for cases in [(("a", plain), ("b", more))]
        for task in ("causal_lm",)
        if all((tmp_path / kind).mkdir(exist_ok=True) is None for kind, _ in cases)
    }
    assert found["causal_lm"][0] == found["causal_lm"][1] == [[*b"first", 256, *b"second", 256]]
    labelled = written(tmp_path, "jsonl", [{**row, "label": n} for n, row in enumerate(more)])
    manifest = read_dataset_manifest(prepare(prepared(labelled, "classification"), None))
    assert manifest
    assert (manifest.feature_shape, manifest.classes) == (None, 2)


def test_a_field_within_a_field_is_named_by_its_path(tmp_path: Path) -> None:
    """`a.b`, unless a column has that very name; class numbers may be text, as in a CSV."""
    rows = [{"a": {"b": "deep"}, "meta": {"y": 1}}, {"a": {"b": "er"}, "meta": {"y": 0}}]
    data = prepared(
        written(tmp_path, "jsonl", rows), "classification", text_field="a.b", label_field="meta.y"
    )
    assert tokens_of(data) == [[*b"deep"], [*b"er"]]
    flat = [{"a.b": "flat", "y": "1"}, {"a.b": "too", "y": "0"}]
    data = prepared(
        written(tmp_path, "csv", flat), "classification", text_field="a.b", label_field="y"
    )
    assert tokens_of(data) == [[*b"flat"], [*b"too"]]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    """Also those in folders below, in one order; hidden files and other formats are left out."""
    for name in (
        "b.txt",
        "a/z.jsonl",
        "a/c.csv.gz",
        ".hidden/x.txt",
        "a/.y.txt",
        "notes.bin",
        "a::b.jsonl",
    ):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            gzip.compress(b"text\nt\n") if name.endswith(".gz") else b'{"text": "t"}\n'
        )
    found = matching_files(prepared(tmp_path / "d", "causal_lm"))
    assert [str(p.relative_to(tmp_path / "d")) for p in found] == [
        "a/c.csv.gz",
        "a/z.jsonl",
        "a::b.jsonl",
        "b.txt",
    ]
    assert tokens_of(prepared(tmp_path / "d", "causal_lm"))


def rows_or_message(path: Path) -> tuple[list[SourceRow], str]:
    try:
        return sound(path), ""
    except DataError as error:
        return [], str(error)


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**31))
def test_mutated_files_never_lose_rows_in_silence(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Bytes changed, cut off or doubled: a DataError that names the file, or as many rows as lines say."""
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("m")
    kind = draw.choice(["jsonl", "json", "csv", "tsv", "parquet"])
    path = written(folder, kind)
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content))
        how = draw.randrange(4)
        if how == 0:
            content[place] = draw.randrange(256)
        elif how == 1:
            del content[place : place + draw.randrange(1, 20)]
        elif how == 2:
            content[place:place] = bytes([draw.choice(b',"{}[]\\\n\t0')])
        else:
            content = content[: max(1, place)]
        if not content:
            content = bytearray(b"x")
    path.write_bytes(content)
    rows, refused = rows_or_message(path)
    if refused:
        assert path.name in refused
        return
    if kind == "jsonl":
        assert len(rows) == sum(
            bool(line.strip()) for line in content.decode("utf-8-sig").split("\n")
        )
    if kind in ("csv", "tsv"):
        width = len(
            next(
                csv.reader(
                    io.StringIO(content.decode("utf-8-sig")),
                    delimiter="," if kind == "csv" else "\t",
                )
            )
        )
        assert all(len(row.fields) == width for row in rows)
    assert all(isinstance(row.fields, dict) for row in rows)


def test_every_format_has_a_name() -> None:
    """Parquet is not compressed again."""
    assert {format_of(Path(f"x{suffix}")) for suffix in FORMATS} == set(FORMATS.values())
    assert format_of(Path("x.jsonl.zst")) == "jsonl"
    assert format_of(Path("x.parquet.gz")) is None
    assert format_of(Path("x.gz")) is None


def bad_rows(folder: Path, good: int, bad: int) -> Path:
    """Rows of which some are not JSON, some have no text, and one is no object, among good ones."""
    kinds = ['{"prompt": ', '{"prompt": "a"}', "[1]", '{"prompt": "a", "completion": null}']
    lines = [json.dumps({"prompt": f"p{n}", "completion": "c"}) for n in range(good)]
    for number in range(bad):
        lines.insert(number * 7 % (good + 1), kinds[number % len(kinds)])
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    """Counted and named, and told by every plan of these data; without the key the first one stops."""
    path = bad_rows(tmp_path, 40, 4)
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: not JSON"):
        prepare(prepared(path), None)
    data = prepared(path, on_bad_row="skip")
    manifest = read_dataset_manifest(prepare(data, None))
    assert manifest
    assert (manifest.samples, manifest.skipped, manifest.dropped) == (40, 4, 0)
    assert "rows.jsonl, line 1: not JSON" in manifest.first_problem
    plain = {"source": "files", "name": None, "path": str(path), "task": "sft", "sequence_length": 64,
             "tokenizer": "bytes", "on_bad_row": "skip", "samples": None, "validation": 0.0, "options": {}}  # fmt: skip
    warnings = make_plan(validate(tiny_recipe(data=plain), "r")).warnings
    assert any("4 bad rows skipped; " in warning and "line 1" in warning for warning in warnings)


def test_more_than_a_few_bad_rows_stop_all_the_same(tmp_path: Path) -> None:
    """At most 1 %, or ten: a wrong column name must not leave a handful of rows."""
    data = prepared(bad_rows(tmp_path, 100, 11), on_bad_row="skip")
    with pytest.raises(
        DataError, match=r"11 of \d+ rows are bad, which is more than 1%. The first: .*line"
    ):
        prepare(data, None)


def test_rows_without_a_target_are_told(tmp_path: Path) -> None:
    """By the plan, and as the reason where none is left."""
    rows = [{"prompt": "p" * 90, "completion": "c"}] * 10 + [{"prompt": "p", "completion": "c"}]
    data = prepared(written(tmp_path, "jsonl", rows))
    plain = {"source": "files", "name": None, "path": data.path, "task": "sft", "sequence_length": 64,
             "tokenizer": "bytes", "samples": None, "validation": 0.0, "options": {}}  # fmt: skip
    recipe = validate(tiny_recipe(data=plain), "r")
    prepare(recipe.data, recipe.project)
    assert any(
        "10 prepared rows have no target" in warning for warning in make_plan(recipe).warnings
    )
    with pytest.raises(DataError, match="10 have no target within sequence_length 64"):
        prepare(prepared(written(tmp_path, "json", rows[:10])), None)
