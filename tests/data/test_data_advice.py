"""Data that are refused with a "Nearest" are prepared when that is followed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from advice import ROOT, Row, command, heard, here, programs, refused, worked
from conftest import tiny_recipe
from drumline.data.prepare import prepare
from drumline.errors import DataError
from drumline.recipe import yaml12
from drumline.recipe.data_section import Data

__all__ = ["here", "programs"]

TEXT = {"t.txt": "some words\n" * 200, "u.txt": "other words\n" * 200}
"""Files of a row: what a way writes replaces them; other keys of it are the data section's."""

MINE = """import numpy as np
from drumline.data.tasks import Encoded, Task


class Mine(Task):
    def encode(self, row, tokenizer):
        return Encoded(count=1, arrays={"inputs": np.array([len(row["text"])])})

    def collate(self, rows, indices):
        return {"inputs": rows.array("inputs", indices)}


def task():
    return Mine()
"""

DATA: list[Row] = [
    Row("is matched twice. Nearest: patterns that do not overlap", {**TEXT, "path": ["t.txt", "*.txt"]},
        [{"path": ["t.txt", "u.txt"]}, {"path": "*.txt"}]),
    Row("which is none. Nearest: validation 0.01 (one document)",
        {"t.jsonl": "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(100)), "path": "t.jsonl", "validation": 0.001},
        [{"validation": 0.01}]),
    Row("which is none. Nearest: validation 0", {"t.jsonl": '{"text": "the only row of it"}\n', "path": "t.jsonl", "validation": 0.1,
        "validation_split": "periodic"}, [{"validation": 0.0}]),
    Row("2 columns are named 'text'. Nearest: rename one", {"t.csv": "text,text\n" + "a,b\n" * 99, "path": "t.csv"},
        [{"t.csv": "text,other\n" + "a word,b\n" * 99}]),
    Row("quote a field that holds a comma, and end no line with one", {"t.csv": "text,n\n" + "a, b,1\n" * 99, "path": "t.csv"},
        [{"t.csv": "text,n\n" + '"a, b",1\n' * 99}]),
    Row("quote a field that holds a", {"t.csv": "text,n\n" + "a b,1,\n" * 99, "path": "t.csv"}, [{"t.csv": "text,n\n" + "a b,1\n" * 99}]),
    Row("fields, and the header has 2. Nearest: quote a field that holds a tab", {"t.tsv": "text\tn\n" + "a\tb\t1\n" * 99, "path": "t.tsv"},
        [{"t.tsv": "text\tn\n" + '"a\tb"\t1\n' * 99}]),
    Row("bytes has no begin-of-text token. Nearest: data.bos=auto", {**TEXT, "path": "t.txt", "bos": True}, [{"bos": "auto"}]),
    Row("has no begin-of-text token. Nearest: data.bos=auto", {**TEXT, "path": "t.txt", "tokenizer": "words", "bos": True}, [{"bos": "auto"}]),
    Row("Nearest: a subclass of drumline.data.tasks.Task",
        {"m.py": "def task():\n    return object()\n", **TEXT, "path": "t.txt", "task": "custom", "task_factory": "m:task"},
        [{"m.py": MINE}]),
]  # fmt: skip


def prepared(folder: Path, given: dict[str, Any]) -> Path:
    """Write the files among these, and prepare the rest as a data section."""
    section: dict[str, Any] = {"source": "files", "task": "causal_lm", "sequence_length": 16}
    for name, value in given.items():
        if "." in name:
            (folder / name).write_text(value)
        elif name == "path" and value:
            paths = [str(folder / one) for one in ([value] if isinstance(value, str) else value)]
            section["path"] = paths if isinstance(value, list) else paths[0]
        elif name == "tokenizer":
            from transformers import PreTrainedTokenizerFast

            inner = Tokenizer(models.WordLevel({"some": 0, "words": 1, "?": 2}, unk_token="?"))
            PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="?").save_pretrained(
                folder / value
            )
            section[name] = str(folder / value)
        else:
            section[name] = value
    return prepare(Data(**section), str(folder))


@pytest.mark.parametrize("row", DATA, ids=lambda row: row.words)
def test_data_are_prepared_as_the_message_says(tmp_path: Path, row: Row) -> None:
    """`prepare` refuses a file or a key; with what the message names in its place it writes rows."""
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, row.wrong)
    heard(row.words, str(caught.value))
    for way in row.ways:
        assert prepared(tmp_path, {**row.wrong, **way}).is_dir()


def test_a_trace_of_rows_that_only_their_code_knows(here: Path, forked: Any) -> None:
    """`drumline run` with a short duration measures what `plan --trace` cannot."""
    for name in ("additions.py", "helpers.py", "additions.yaml"):
        shutil.copy(ROOT / "tests/seams" / name, here)
    split = ["batch.gpus=1", "batch.accumulation=null"]
    told = refused("plan", "additions.yaml", *split, "--trace")
    heard("is known to its own code only", told)
    short = ["duration.steps=2", "schedule.warmup_steps=0"]
    done = forked("run", str(here / "additions.yaml"), *split, *short)
    assert done.returncode == 0, done.stderr


BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300,
        "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


def test_a_trace_of_samples_of_unknown_shape(here: Path) -> None:
    """Prepared first, or for texts with a stated length: the plan is traced, and what is prepared is planned."""
    rows = [{"text": f"row {n}", "label": n % 3} for n in range(60)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        "source": "files",
        "name": None,
        "path": "rows.jsonl",
        "task": "classification",
        "samples": 48,
    }
    model = {"source": "config", "factory": None, "architecture": "bert", "config": BERT}
    one = {"effective": 12, "per_device": 3, "gpus": 1}
    text = tiny_recipe(data=data, model=model, batch=one, project=None)
    for name, plain in (("text", text), ("features", tiny_recipe(batch=one))):
        Path(f"{name}.yaml").write_text(yaml12.dump(plain))
        told = refused("plan", f"{name}.yaml", "--trace")
        heard("the shape of a sample is not known until the data are prepared", told)
        if "data.sequence_length" in told:
            assert command("plan", f"{name}.yaml", "--trace", "data.sequence_length=32").code == 0
        worked("prepare", f"{name}.yaml")
        worked("plan", f"{name}.yaml", "--trace")
