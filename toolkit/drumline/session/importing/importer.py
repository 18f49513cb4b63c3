"""`drumline import`: which tool each file is of, what of all of them is one recipe, and what is not."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.errors import RecipeError
from drumline.recipe.catalogue import SCHEMA_LINE
from drumline.recipe.load import validate
from drumline.session.importing import (
    accelerate,
    arguments,
    axolotl,
    deepspeed,
    llama_factory,
    scripts,
    torchtune,
)
from drumline.session.importing.draft import UNSUPPORTED, Draft
from drumline.session.importing.reading import Command, Source, read
from drumline.session.importing.writing import nested, text_of

_TRAINERS = {"sft": "sft", "dpo": "dpo", "kto": "kto", "orpo": "orpo", "reward": "rm"}
_TOOLS: tuple[tuple[Any, str], ...] = (
    (deepspeed, "DeepSpeed"),
    (accelerate, "accelerate"),
    (torchtune, "torchtune"),
    (axolotl, "axolotl"),
)
"""Modules with `is_of(keys)` and `take(draft, keys)`."""
_GUESSED_GPU = "h100-80gb"


@dataclass(frozen=True)
class Imported:
    """A recipe's YAML, what is not in it, and whether it is a legal recipe (else why not)."""

    name: str
    text: str
    draft: Draft
    tools: tuple[str, ...]
    problem: str


def import_files(
    paths: Sequence[Path], gpus: int | None = None, gpu: str | None = None
) -> Imported:
    """One recipe of these files together; RecipeError where one of them is of no tool that is known."""
    draft, tools = Draft(), []
    sources = [(read(path), path) for path in paths]
    given = {path.resolve() for path in paths}
    for source, path in sorted(sources, key=lambda pair: _rank(pair[0])):
        draft.file = source.name
        try:
            tools.append(_take(draft, source, path.parent, given))
        except (TypeError, ValueError, AttributeError) as error:
            raise RecipeError(
                f"{path}: a value that its tool does not take, or a variable that the script does not set: "
                f"{error}"
            ) from None
    _finish(draft, gpus, gpu)
    of_training = max(sources, key=lambda pair: _rank(pair[0]))[1]
    name = re.sub(r"[^a-z0-9._-]+", "-", of_training.stem.lower()).strip("-._") or "imported"
    draft.keys = {"recipe": name, "schema": 1, **draft.keys}
    head = [
        SCHEMA_LINE,
        f"Imported from {', '.join(path.name for path in paths)} ({', '.join(dict.fromkeys(tools))}).",
    ]
    head += [f"Differs: {text}." for text in draft.differences]
    problem = ""
    try:
        validate(nested(draft.keys), name)
    except RecipeError as error:
        problem = str(error)
    return Imported(name, text_of(draft, head), draft, tuple(dict.fromkeys(tools)), problem)


def _rank(source: Source) -> int:
    """Engines' files first, so that what a training states itself holds where both do."""
    if deepspeed.is_of(source.keys):
        return 0
    return 1 if accelerate.is_of(source.keys) else 2


def _take(draft: Draft, source: Source, folder: Path, given: Collection[Path] = ()) -> str:
    """Carry over a file; the name of its tool. `given`: files that are imported beside it."""
    if source.command is not None:
        return _take_command(draft, source.command, folder, given)
    keys = source.keys
    for module, name in _TOOLS:
        if module.is_of(keys):
            module.take(draft, keys)
            return name
    if llama_factory.is_of(keys):
        llama_factory.take(draft, keys, folder)
        return "LLaMA-Factory"
    own = {
        "per_device_train_batch_size",
        "learning_rate",
        "num_train_epochs",
        "output_dir",
        "model_name_or_path",
    }
    if own & set(keys):
        is_trl = {
            "dataset_name",
            "dataset_mixer",
            "packing",
            "use_peft",
            "max_length",
            "max_seq_length",
            "beta",
        } & set(keys)
        is_preference = any(key in keys for key in ("beta", "loss_type", "desirable_weight"))
        arguments.take(draft, keys, ("dpo" if is_preference else "sft") if is_trl else "")
        return "TRL" if is_trl else "TrainingArguments"
    raise RecipeError(
        f"{source.name}: of no tool that is known (axolotl, LLaMA-Factory, TRL, torchtune, "
        "TrainingArguments, accelerate, DeepSpeed). Nearest: the file that the other tool is started with"
    )


def _take_command(draft: Draft, command: Command, folder: Path, given: Collection[Path]) -> str:
    """Carry over a launch command and the files that it names, where they are at hand."""
    _take_launch(draft, command)
    flags = dict(command.flags)
    named = [
        flags.pop(key, None) for key in ("deepspeed", "deepspeed_config", "config", "config_file")
    ]
    named += [command.launcher_flags.get("config_file"), *command.files]
    tool = ""
    for name in filter(None, named):
        file = folder / str(name)
        if isinstance(name, str) and file.resolve() in given:
            continue
        if isinstance(name, str) and file.is_file():
            tool = _take(draft, read(file), file.parent)
        else:
            deepspeed.take_name(draft, name)
    program = Path(command.program.split(" ")[-1]).stem
    trainer = next((own for word, own in _TRAINERS.items() if word in program.lower()), "")
    if flags:
        if "finetuning_type" in flags or "stage" in flags:
            llama_factory.take(draft, flags, folder)
            return "LLaMA-Factory"
        is_example = scripts.take(draft, flags, program)
        arguments.take(draft, flags, trainer)
        return "TRL" if trainer else "transformers" if is_example else "TrainingArguments"
    return tool or "a launch command"


def _take_launch(draft: Draft, command: Command) -> None:
    """How many GPUs, and by which launcher."""
    flags = {**command.launcher_flags}
    nodes = flags.get("nnodes") or flags.get("num_machines") or flags.get("num_nodes") or 1
    per_node = flags.get("nproc_per_node") or flags.get("num_gpus")
    total = flags.get("num_processes")
    include = flags.get("include")
    if isinstance(include, str) and ":" in include:
        per_node = len(include.rpartition(":")[2].split(","))
    visible = command.environment.get("CUDA_VISIBLE_DEVICES")
    if (
        per_node is None
        and total is None
        and visible
        and command.launcher in ("deepspeed", "python", "python3", "llamafactory-cli")
    ):
        per_node = len(visible.split(",")) if command.launcher != "python" else 1
    if isinstance(total, int):
        draft.set("batch.gpus", total)
    elif isinstance(per_node, int) and isinstance(nodes, int):
        draft.set("batch.gpus", per_node * nodes)
        if nodes > 1:
            draft.set("cluster.gpus_per_node", per_node)
    elif command.launcher in ("python", "python3"):
        draft.set("batch.gpus", 1)
    if command.launcher == "deepspeed":
        draft.set("launch.launcher", "deepspeed")
    draft.taken += 1


def _finish(draft: Draft, gpus: int | None, gpu: str | None) -> None:
    """What the files leave open, chosen and said."""
    if gpus is not None:
        draft.set("batch.gpus", gpus)
    draft.set("batch.gpus", 1, "chosen: no file says on how many GPUs; `--gpus N`", weakly=True)
    if gpu is not None:
        draft.set("cluster.gpu", gpu)
    draft.set("cluster.gpu", _GUESSED_GPU, "chosen: no file says which; `--gpu NAME`", weakly=True)
    draft.set("optimizer.name", "adamw", weakly=True)
    draft.set("optimizer.lr", 5e-5, "chosen: no file states it", weakly=True)
    if (
        draft.keys.get("launch.launcher") == "deepspeed"
        and str(draft.keys.get("strategy.name", "ddp")) == "fsdp"
    ):
        draft.set("launch.launcher", "torchrun")
    if draft.keys.get("data.task") in ("sft", "causal_lm", "preference"):
        draft.set("data.sequence_length", 1024, "the default of TRL", weakly=True)
    if "data.image" in draft.keys and draft.keys.get("data.task") != "sft":
        draft.keys.pop("data.tokenizer", None)  # pictures have no text
    if draft.keys.get("data.packing") == "documents" and draft.keys.get("data.task") == "causal_lm":
        draft.keys.pop("data.packing")
    has_adapter = any(key.startswith("model.adapter") for key in draft.keys)
    if not has_adapter and (bits := draft.keys.pop("model.quantization", None)):
        draft.leave(
            "quantization", bits, UNSUPPORTED, "weights are quantised under an adapter only"
        )
    if (
        draft.keys.get("data.packing") == "documents"
        and draft.keys.get("model.attention") == "flash"
    ):
        draft.set("model.attention", "sdpa", "in place of flash: it keeps packed documents apart")
    if "model.quantization" in draft.keys and draft.keys.get("launch.launcher") == "deepspeed":
        draft.set("launch.launcher", "torchrun")
        draft.set(
            "strategy.name", "fsdp", "in place of ZeRO, which does not take quantised weights"
        )
        draft.keys.pop("strategy.offload", None)
    if "model.adapter.alpha" in draft.keys or "model.adapter.targets" in draft.keys:
        draft.set("model.adapter.rank", 8, "the default of peft", weakly=True)
    if "data.source" not in draft.keys and "data.mixture" not in draft.keys:
        draft.set("data.source", "files")
        draft.set("data.path", "train.jsonl", "chosen: no file names the data")
    is_evaluated = "data.evaluation" in draft.keys or draft.keys.get("data.validation")
    if not is_evaluated:
        for key in [
            key for key in draft.keys if key.startswith(("evaluation.", "early_stopping."))
        ]:
            value = draft.keys.pop(key)
            draft.leave(key, value, UNSUPPORTED, "no file says which data to evaluate")
    elif not any(key.startswith("evaluation.every") for key in draft.keys):
        draft.set("evaluation.every_epochs", 1.0, "chosen: no file says when")
    _settle_durations(draft)
    if "schedule.warmup_ratio" in draft.keys:
        draft.differ(
            "a warm-up by ratio is rounded up by transformers, and to the nearest step here"
        )
    if draft.keys.get("schedule.warmup_steps") or "schedule.warmup_ratio" in draft.keys:
        draft.differ(
            "transformers and torchtune take rate 0 at the first step of a warm-up, and each rate a step "
            "later; here step t of W has t/W of the peak"
        )
    draft.differ(
        "every counted token of the effective batch weighs the same here; transformers before 4.46 averages "
        "the means of micro-batches, and without average_tokens_across_devices those of ranks"
    )
    draft.differ("the order of the samples is another, and the same at every split")


def _settle_durations(draft: Draft) -> None:
    """Keys that exclude each other: the more exact one stays."""
    if "duration.steps" in draft.keys:
        draft.keys.pop("duration.epochs", None)
    for section in ("evaluation", "checkpoint"):
        if f"{section}.every_steps" in draft.keys:
            draft.keys.pop(f"{section}.every_epochs", None)
    if draft.keys.get("schedule.warmup_steps"):
        draft.keys.pop("schedule.warmup_ratio", None)
    elif "schedule.warmup_ratio" in draft.keys:
        draft.keys.pop("schedule.warmup_steps", None)
    if not any(key.startswith("checkpoint.every") for key in draft.keys):
        draft.set("checkpoint.every_epochs", 1.0, "chosen: no file says when")
