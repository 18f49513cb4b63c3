"""`drumline new`: a recipe from a model, data, GPUs and a method, with the fastest split that fits."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from drumline.architectures.gpus import Gpu, find_gpu
from drumline.errors import PlanError, RecipeError
from drumline.plan.fastest import fastest_that_fits
from drumline.plan.model import Plan
from drumline.recipe.catalogue import SCHEMA_LINE
from drumline.recipe.load import recipe_of_mapping
from drumline.session.importing.draft import Draft
from drumline.session.importing.writing import nested, text_of
from drumline.session.planning import make_plan, world_of
from drumline.session.rows_at_hand import RowsAtHand, look_at
from drumline.session.unprepared import ROWS

METHODS = ("full", "lora", "qlora")
TASKS = ("causal_lm", "sft", "preference", "classification", "seq2seq")
_RATES = {
    ("causal_lm", True): 2e-5, ("causal_lm", False): 2e-4, ("sft", True): 1e-5, ("sft", False): 2e-4,
    ("preference", True): 5e-7, ("preference", False): 5e-6, ("classification", True): 2e-5,
    ("classification", False): 2e-4, ("seq2seq", True): 5e-5, ("seq2seq", False): 5e-4,
}  # fmt: skip
"""Peak rates by task and whether all weights are trained; usual ones, to begin a search from."""
_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_STEPS_OF_LENGTH = (128, 256, 512, 1024)
_VALIDATION = 0.02
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
    """A recipe's text, its name, and whether a split that fits was found; None where memory is not known.

    `samples`: about how many an epoch has, None where the rows are not at hand.
    """

    name: str
    text: str
    is_split_chosen: bool | None
    samples: int | None


def new_recipe(wish: Wish) -> Proposed:
    """The recipe, with a comment at each choice. RecipeError or PlanError says what of the wish cannot be."""
    if wish.method not in METHODS:
        raise RecipeError(
            f"--method {wish.method}: choose from {', '.join(METHODS)}. Nearest: lora"
        )
    gpu = find_gpu(wish.gpu)
    draft = Draft()
    rows = look_at(wish.data)
    task = wish.task or _task_of(wish.data, rows)
    if task not in TASKS:
        raise RecipeError(f"--task {task}: choose from {', '.join(TASKS)}. Nearest: sft")
    name = _slug(wish.name or f"{Path(wish.model).name}-{task.replace('_', '-')}-{wish.method}")
    draft.set("recipe", name)
    draft.set("schema", 1)
    _set_model(draft, wish)
    _set_data(draft, wish, task, rows)
    _set_training(draft, wish, task, gpu)
    is_chosen = _choose_split(draft, rows)
    head = [
        SCHEMA_LINE,
        f"Made by `drumline new`; `drumline plan {name}.yaml` checks it.",
    ]
    return Proposed(name, text_of(draft, head), is_chosen, _samples(draft, rows))


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


def _set_data(draft: Draft, wish: Wish, task: str, rows: RowsAtHand | None) -> None:
    looks_like_file = (
        Path(wish.data).exists() or Path(wish.data).suffix or wish.data.startswith((".", "/", "~"))
    )
    draft.set("data.source", "files" if looks_like_file else "hub")
    draft.set("data.path" if looks_like_file else "data.name", wish.data)
    draft.set("data.task", task, "" if wish.task else "as the first row looks")
    is_folder = draft.keys["model.source"] == "folder"
    draft.set("data.tokenizer", _as_folder(wish.model) if is_folder else wish.model)
    _set_length(draft, wish, task, rows)
    share = _VALIDATION if rows is None else max(_VALIDATION, 1 / max(2, rows.count))
    draft.set(
        "data.validation",
        math.ceil(share * 1000) / 1000,
        "chosen: this share is evaluated, and never trained",
    )


def _set_length(draft: Draft, wish: Wish, task: str, rows: RowsAtHand | None) -> None:
    """Tokens of a row: as stated, or as the longest hundredth of the rows wants, up to a usual length."""
    length, why = wish.sequence_length, ""
    if length is None:
        length, why = _LENGTHS.get(task, 2048), "chosen; longer rows are cut"
        if rows and task != "causal_lm":  # whose rows are packed
            wanted = rows.longest_but(0.01)
            length = next((n for n in _STEPS_OF_LENGTH if wanted <= n < length), length)
            why = (
                f"chosen: 99 % of the rows have up to about {wanted:,} tokens; longer ones are cut"
            )
    draft.set("data.sequence_length", length, why)


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


def _samples(draft: Draft, rows: RowsAtHand | None) -> int | None:
    """About how many samples an epoch has."""
    if rows is None:
        return None
    count = rows.count
    if draft.keys["data.task"] == "causal_lm":
        count = rows.tokens_of_all() // int(draft.keys["data.sequence_length"])
    return max(1, count - math.ceil(count * float(draft.keys["data.validation"])))


def _choose_split(draft: Draft, rows: RowsAtHand | None) -> bool | None:
    """Set the fastest split that fits; None where memory is not known, False where nothing fits."""
    plan = _plan_of_legal_length(draft, rows)
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
    for section in ("strategy", "model", "loss"):
        fields = type(getattr(plan.recipe, section)).model_fields
        for key, value in change[section].items():
            if value != fields[key].default:
                draft.set(f"{section}.{key}", value, said)
    if per_device := change.get("evaluation", {}).get("per_device"):
        draft.set("evaluation.per_device", per_device)
    return True


def _plan_of_legal_length(draft: Draft, rows: RowsAtHand | None) -> Plan:
    """The plan; rows whose length was chosen here become shorter where the model learns fewer positions."""
    while True:
        try:
            samples = _samples(draft, rows) or ROWS
            return make_plan(recipe_of_mapping(nested(draft.keys), [f"data.samples={samples}"]))
        except PlanError as error:
            length = draft.keys["data.sequence_length"]
            if "data.sequence_length" not in str(error) or length <= 128:
                raise
            if "data.sequence_length" not in draft.comments:
                raise
            draft.keys["data.sequence_length"] = length // 2


def _task_of(data: str, rows: RowsAtHand | None) -> str:
    """The task that the first row of a file is for; RecipeError where it is not at hand, or of none."""
    if rows is None and Path(data).suffix in _FILES:
        raise RecipeError(f"--data {data}: no such file, or it has no row")
    if rows is None:
        raise RecipeError(
            f"{data}: its rows are not at hand, so --task has to say what they are. Nearest: --task sft"
        )
    keys = set(rows.first)
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


def _as_folder(name: str) -> str:
    return name if name.startswith((".", "/", "~")) else f"./{name}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:100] or "mine"
