"""Public training jobs, each as a file of the tool that such a job is written for, imported and planned.

`jobs/jobs.csv` tells what each of them trained; the files beside it were written from these facts.
"""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from drumline.plan.model import Plan
from drumline.recipe.load import load_recipe
from drumline.session.importing.draft import UNKNOWN
from drumline.session.importing.importer import Imported, import_files
from drumline.session.planning import make_plan

JOBS = Path(__file__).parent / "jobs"
FACTS = {row["id"]: row for row in csv.DictReader((JOBS / "jobs.csv").open())}
MODELS = {
    "bloom-396m": {"model_type": "bloom", "hidden_size": 1024, "n_layer": 20, "n_head": 16, "vocab_size": 46145},
    "olmo-7b": {"model_type": "olmo", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "vocab_size": 50304},
    "llava-1.5-7b": {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064},
                     "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                                       "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}},
    "qwen2.5-vl-7b": {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "depth": 32},
                      "text_config": {"model_type": "qwen2_5_vl_text", "hidden_size": 3584}},
}  # fmt: skip
"""Models that the files name by a folder, because no table of ours has them."""
METHODS = {"lora-sft": (True, "none"), "qlora-sft": (True, "nf4"), "vlm": (None, "none"), "preference": (None, None)}  # fmt: skip
"""Whether there is an adapter, and in what bits the weights under it are; None where the options tell."""
OTHER_SPLITS = {"P34": 8}
"""Accumulation where a pipeline's becomes that of four data ranks."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Imported, Plan]]:
    folder = tmp_path_factory.mktemp("jobs") / "jobs"
    shutil.copytree(JOBS, folder)
    for name, config in MODELS.items():
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text(json.dumps(config))
    return {job: _imported(folder, job) for job in FACTS}


def _imported(folder: Path, job: str) -> tuple[Imported, Plan]:
    stated = FACTS[job]["gpus"]
    gpus = int(stated) if stated.isdigit() else 8
    found = import_files(sorted(folder.glob(f"{job}.*")), gpus, "a100-80gb")
    assert found.problem == "", job
    recipe = folder / f"{job}.recipe.yaml"
    recipe.write_text(found.text)
    return found, make_plan(load_recipe(str(recipe), ["data.samples=1000000"]))


def test_at_least_forty_jobs_have_a_file() -> None:
    """Of every kind that is supported."""
    assert {path.name.split(".")[0] for path in JOBS.glob("*.*")} - {"jobs"} == set(FACTS)
    assert len(FACTS) >= 40
    assert len({row["method"] for row in FACTS.values()}) >= 9


@pytest.mark.parametrize("job", FACTS)
def test_a_job_is_imported_as_it_was_trained(job: str, imported: Any) -> None:
    """Batch, rate, schedule, precision, length, method and strategy are those of the job."""
    found, plan = imported[job]
    row, keys = FACTS[job], found.draft.keys
    assert plan.batch.per_device == int(row["per_device"])
    assert plan.batch.accumulation == OTHER_SPLITS.get(job, int(row["accumulation"]))
    if row["effective"] != "?":
        assert plan.batch.effective == int(row["effective"])
    if row["lr"] != "?":
        assert keys["optimizer.lr"] == float(row["lr"])
    if row["precision"] not in ("?", "bf16-pure"):
        assert keys.get("precision", "fp32") == row["precision"]
    if row["seq_len"].isdigit() and "data.sequence_length" in keys:
        assert keys["data.sequence_length"] == int(row["seq_len"])
    assert {key: keys.get(key) for key in schedule(row)} == schedule(row)
    for word, name in (
        ("zero1", "zero1"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
        ("fsdp", "fsdp"),
    ):
        if word in row["strategy"] and job not in ("T05",):
            assert keys["strategy.name"] == name
    if row["method"] in METHODS or row["method"] == "full-sft":
        assert method(row) == (
            "model.adapter.rank" in keys, keys.get("model.quantization", "none"))  # fmt: skip
    assert not [left for left in found.draft.left if left.kind == UNKNOWN]


def schedule(row: dict[str, str]) -> dict[str, Any]:
    """What a job's schedule is in keys of a recipe."""
    text, found = row["schedule"], {}
    if word := re.match(r"cosine|linear|polynomial|constant", text):
        found["schedule.name"] = word[0]
    if steps := re.search(r"warmup (\d+)\b(?!%)", text):
        found["schedule.warmup_steps"] = int(steps[1])
    if share := re.search(r"warmup (\d+)%", text):
        found["schedule.warmup_ratio"] = int(share[1]) / 100
    if least := re.search(r"min (0\.\d+)", text):
        found["schedule.min_lr_ratio"] = float(least[1])
    return found


def method(row: dict[str, str]) -> tuple[bool, str]:
    adapter, bits = METHODS.get(row["method"], (False, "none"))
    is_adapted = "LoRA" in row["options"] if adapter is None else adapter
    return is_adapted, ("nf4" if "QLoRA" in row["options"] else "none") if bits is None else bits
