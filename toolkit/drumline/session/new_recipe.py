"""`drumline new`: a recipe from a model, data, GPUs and a method, with the fastest split that fits."""

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.architectures.gpus import Gpu, find_gpu
from drumline.errors import PlanError, RecipeError
from drumline.plan.fastest import fastest_that_fits
from drumline.plan.model import Plan
from drumline.recipe.catalogue import SCHEMA_LINE
from drumline.recipe.load import recipe_of_mapping
from drumline.session.assumed_rows import ROWS
from drumline.session.importing.draft import Draft
from drumline.session.importing.writing import nested, text_of
from drumline.session.planning import make_plan, world_of

METHODS = ("full", "lora", "qlora")
TASKS = ("causal_lm", "sft", "preference", "classification", "seq2seq")
_RATES = {
    ("causal_lm", True): 2e-5, ("causal_lm", False): 2e-4, ("sft", True): 1e-5, ("sft", False): 2e-4,
    ("preference", True): 5e-7, ("preference", False): 5e-6, ("classification", True): 2e-5,
    ("classification", False): 2e-4, ("seq2seq", True): 5e-5, ("seq2seq", False): 5e-4,
}  # fmt: skip
"""Peak rates by task and whether all weights are trained; usual ones, to begin a search from."""
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_LENGTHS = {"classification": 512, "seq2seq": 512}


@dataclass(frozen=True)
class Wish:
    """What a recipe is wanted for; what is None is chosen, and said.

    `model`: a name of the hub or a folder. `data`: a file, a pattern or a folder, or a set of the hub.
    """

    model: str
    data: str
    gpus: int
    gpu: str
    method: str = "full"
    task: str | None = None
    effective: int | None = None
    sequence_length: int | None = None
    epochs: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Proposed:
    """A recipe's text, its name, and whether a split that fits was found; None where memory is not known."""

    name: str
    text: str
    is_split_chosen: bool | None


def new_recipe(wish: Wish) -> Proposed:
    """The recipe, with a comment at each choice. RecipeError or PlanError says what of the wish cannot be."""
    if wish.method not in METHODS:
        raise RecipeError(
            f"--method {wish.method}: choose from {', '.join(METHODS)}. Nearest: lora"
        )
    gpu = find_gpu(wish.gpu)
    draft = Draft()
    task = wish.task or _task_of(wish.data)
    if task not in TASKS:
        raise RecipeError(f"--task {task}: choose from {', '.join(TASKS)}. Nearest: sft")
    name = _slug(wish.name or f"{Path(wish.model).name}-{task.replace('_', '-')}-{wish.method}")
    draft.set("recipe", name)
    draft.set("schema", 1)
    _set_model(draft, wish)
    _set_data(draft, wish, task)
    _set_training(draft, wish, task, gpu)
    is_chosen = _choose_split(draft)
    head = [
        SCHEMA_LINE,
        f"Made by `drumline new`; `drumline plan {name}.yaml` checks it.",
    ]
    return Proposed(name, text_of(draft, head), is_chosen)


def _set_model(draft: Draft, wish: Wish) -> None:
    is_folder = wish.model.startswith((".", "/", "~")) or Path(wish.model).is_dir()
    draft.set("model.source", "folder" if is_folder else "hub")
    draft.set("model.path" if is_folder else "model.name", wish.model)
    if wish.method != "full":
        draft.set(
            "model.adapter", {"rank": 16, "alpha": 32.0}, "on all linear layers of the blocks"
        )
    if wish.method == "qlora":
        draft.set("model.quantization", "nf4", "the frozen base in 4 bits")


def _set_data(draft: Draft, wish: Wish, task: str) -> None:
    looks_like_file = (
        Path(wish.data).exists() or Path(wish.data).suffix or wish.data.startswith((".", "/", "~"))
    )
    draft.set("data.source", "files" if looks_like_file else "hub")
    draft.set("data.path" if looks_like_file else "data.name", wish.data)
    draft.set("data.task", task, "" if wish.task else "as the first row looks")
    is_folder = draft.keys["model.source"] == "folder"
    draft.set("data.tokenizer", _as_folder(wish.model) if is_folder else wish.model)
    length = wish.sequence_length or _LENGTHS.get(task, 2048)
    draft.set(
        "data.sequence_length",
        length,
        "" if wish.sequence_length else "chosen; longer rows are cut",
    )
    draft.set("data.validation", 0.02, "chosen: this share is evaluated, and never trained")


def _set_training(draft: Draft, wish: Wish, task: str, gpu: Gpu) -> None:
    effective = wish.effective or -(-64 // wish.gpus) * wish.gpus
    draft.set(
        "batch.effective", effective, "" if wish.effective else "chosen; usual for fine-tuning"
    )
    draft.set("batch.gpus", wish.gpus)
    draft.set("batch.per_device", 1)
    draft.set("cluster.gpu", wish.gpu)
    draft.set("precision", "fp32" if gpu.is_cpu else "bf16" if gpu.bf16_flops else "fp16")
    draft.set("optimizer.name", "adamw")
    draft.set(
        "optimizer.lr",
        _RATES[task, wish.method == "full"],
        "a usual one; try 1/3 of it, and 3 times",
    )
    draft.set("schedule.name", "cosine")
    draft.set("schedule.warmup_ratio", 0.03)
    draft.set(
        "duration.epochs",
        wish.epochs or (1 if task in ("causal_lm", "preference") else 3),
        "" if wish.epochs else "chosen",
    )
    if task == "preference":
        draft.set("objective.name", "dpo")
    draft.set("evaluation.every_epochs", 0.25)
    draft.set("checkpoint.every_epochs", 0.5)


def _choose_split(draft: Draft) -> bool | None:
    """Set the fastest split that fits; None where memory is not known, False where nothing fits."""
    plan = _plan_of_legal_length(draft)
    if plan.memory.device is None:
        draft.comments["batch.per_device"] = "memory is not known without `drumline plan --trace`"
        return None
    change = fastest_that_fits(plan, world_of(plan))
    if change is None:
        draft.comments["batch.per_device"] = (
            "no split of this training is known to fit; see the plan's advice"
        )
        return False
    said = "the fastest that fits, by estimate"
    draft.set("batch.per_device", change["batch"]["per_device"], said)
    draft.set("batch.accumulation", change["batch"]["accumulation"])
    defaults = (
        ("strategy", "name", "ddp"),
        ("model", "activation_checkpointing", "none"),
        ("loss", "chunked", False),
    )
    for section, key, default in defaults:
        if change[section][key] != default:
            draft.set(f"{section}.{key}", change[section][key], said)
    if per_device := change.get("evaluation", {}).get("per_device"):
        draft.set("evaluation.per_device", per_device)
    return True


def _plan_of_legal_length(draft: Draft) -> Plan:
    """The plan; rows whose length was chosen here become shorter where the model learns fewer positions."""
    while True:
        try:
            return _plan(draft)
        except PlanError as error:
            length = draft.keys["data.sequence_length"]
            if "data.sequence_length" not in str(error) or length <= 128:
                raise
            if "data.sequence_length" not in draft.comments:
                raise
            draft.keys["data.sequence_length"] = length // 2


def _plan(draft: Draft) -> Plan:
    return make_plan(recipe_of_mapping(nested(draft.keys), [f"data.samples={ROWS}"]))


def _task_of(data: str) -> str:
    """The task that the first row of a file is for; RecipeError where it is not at hand, or of none."""
    row = _first_row(data)
    if row is None and Path(data).suffix in _FILES:
        raise RecipeError(f"--data {data}: no such file, or it has no row")
    if row is None:
        raise RecipeError(
            f"{data}: its rows are not at hand, so --task has to say what they are. Nearest: --task sft"
        )
    keys = set(row)
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if keys & {"messages", "conversations"} or {"prompt", "completion"} <= keys:
        return "sft"
    if {"text", "label"} <= keys:
        return "classification"
    if "text" in keys:
        return "causal_lm"
    raise RecipeError(
        f"{data}: columns {', '.join(sorted(keys)) or 'none'}: of no task that is known by its columns. "
        "Nearest: --task sft, and data.prompt_field and data.completion_field in the recipe"
    )


def _first_row(data: str) -> Mapping[str, Any] | None:
    """The first row of a file, or of the first file of a pattern or a folder; None where there is none."""
    from drumline.data.files import format_of
    from drumline.data.readers import read_file

    path = Path(data).expanduser()
    found = path.glob("*") if path.is_dir() else map(Path, glob.glob(str(path)))
    known = [file for file in sorted(found) if file.is_file() and format_of(file)]
    return next((row.fields for file in known[:1] for row in read_file(file)), None)


def _as_folder(name: str) -> str:
    return name if name.startswith((".", "/", "~")) else f"./{name}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:100] or "mine"
