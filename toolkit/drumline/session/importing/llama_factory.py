"""LLaMA-Factory's YAML."""

import json
import re
from pathlib import Path
from typing import Any

from drumline.session.importing import arguments
from drumline.session.importing.draft import UNSUPPORTED, Draft


def is_of(keys: dict[str, Any]) -> bool:
    """Whether a file's keys are LLaMA-Factory's."""
    return "finetuning_type" in keys or ("stage" in keys and "template" in keys)


def take(draft: Draft, given: dict[str, Any], folder: Path) -> None:
    """Carry over a configuration; `folder`: where it lies, in which dataset_info.json may be, too."""
    given = dict(given)
    stage, kind = given.pop("stage", "sft"), given.pop("finetuning_type", "lora")
    if stage in ("rm", "ppo"):
        draft.leave(
            "stage",
            stage,
            UNSUPPORTED,
            "there is no reinforcement learning. Instead: data.task=preference",
        )
    draft.set(
        "data.task", {"pt": "causal_lm", "dpo": "preference", "kto": "preference"}.get(stage, "sft")
    )
    draft.taken += 2
    if kind == "lora":
        draft.set("model.adapter.rank", int(given.pop("lora_rank", None) or 8))
        given.setdefault("lora_alpha", 2 * draft.keys["model.adapter.rank"])
        given.setdefault("lora_target", "all")
        if also := given.pop("additional_target", None):
            draft.set(
                "model.adapter.train_also", [f"*{name.strip()}*" for name in str(also).split(",")]
            )
    elif kind != "full":
        draft.leave(
            "finetuning_type", kind, UNSUPPORTED, "Instead: full, with model.frozen, or lora"
        )
    if kind != "lora":
        for key in [key for key in given if key.startswith("lora_")]:
            given.pop(key)
    if given.pop("pure_bf16", None):
        draft.set("precision", "bf16-pure")
        draft.taken += 1
    if given.pop("disable_gradient_checkpointing", False) is not True:
        draft.set("model.activation_checkpointing", "full", "the default of LLaMA-Factory")
    given.pop("gradient_checkpointing", None)
    given.setdefault("cutoff_len", 2048)
    if given.pop("train_on_prompt", False):
        draft.set("data.train_on", "all")
    if given.pop("mask_history", False):
        draft.set("data.train_on", "last_assistant")
    template = given.pop("template", None)
    if template is not None:
        draft.differ(
            f"template {template}: the tokenizer's own chat template is used; state a file if it is another"
        )
        draft.taken += 1
    arguments.take_model(draft, given)
    _take_sets(draft, given, folder)
    _take_vision(draft, given, str(template or ""), is_adapted=kind == "lora")
    share = given.pop("val_size", None)
    if isinstance(share, float) and 0 < share < 1:
        draft.set("data.validation", share)
        draft.taken += 1
    elif share:
        draft.leave(
            "val_size",
            share,
            UNSUPPORTED,
            "a number of rows. Instead: data.validation, their share",
        )
    if samples := given.pop("max_samples", None):
        draft.set("data.samples", int(samples), "max_samples is of each set there")
        draft.taken += 1
    if stage in ("dpo", "kto"):
        arguments.take_preference(draft, given, stage)
    if not given.get("bf16") and not given.get("fp16"):
        draft.set("precision", "fp32", weakly=True)
    given.pop("pref_beta", None), given.pop("pref_loss", None)
    if given.get("flash_attn") is None:
        given.pop("flash_attn", None)
    given.pop("dataset_dir", None)
    arguments.take(draft, given, tool="llama_factory")


_VISION = (
    ("qwen", ["model.visual.patch_embed.*", "model.visual.blocks.*"], ["model.visual.merger.*"]),
    ("glm", ["model.visual.patch_embed.*", "model.visual.blocks.*"], ["model.visual.merger.*"]),
    ("", ["model.vision_tower.*"], ["model.multi_modal_projector.*"]),
)
"""What of a model that reads images is its eye and what its projector, by the beginning of the template."""
_READS_IMAGES = re.compile(
    r"llava|pixtral|gemma3$|gemma3_vl|qwen.*_vl|qwen2_omni|glm4.*v|mistral_small|mllama"
)


def _take_vision(draft: Draft, given: dict[str, Any], template: str, is_adapted: bool) -> None:
    """Images of chats, and which parts are not trained: the eye and the projector, unless stated."""
    eye = given.pop("freeze_vision_tower", None)
    projector = given.pop("freeze_multi_modal_projector", None)
    language = given.pop("freeze_language_model", False)
    has_images = "data.image_field" in draft.keys or bool(_READS_IMAGES.search(template))
    draft.taken += sum(value is not None for value in (eye, projector)) + bool(language)
    if not has_images:
        return
    draft.set(
        "data.image_field", "images", "the column that LLaMA-Factory's own sets have", weakly=True
    )
    name = draft.keys.get("model.path") or draft.keys.get("model.name")
    draft.set("data.image", {"processor": name}, weakly=True)
    of_eye, of_projector = next((a, b) for start, a, b in _VISION if template.startswith(start))
    frozen = (of_eye if eye is not False else []) + (of_projector if projector is not False else [])
    if is_adapted:
        draft.differ(
            "LLaMA-Factory adapts no layer of the eye while it is frozen; `all-linear` adapts those of its "
            "blocks, too, unless model.adapter.targets names layers that only the language model has"
        )
        return
    if language:
        frozen.append("model.language_model.*")
    if frozen:
        draft.set(
            "model.frozen", frozen, "LLaMA-Factory trains neither eye nor projector unless told to"
        )


def _take_sets(draft: Draft, given: dict[str, Any], folder: Path) -> None:
    """The sets by their names in dataset_info.json, where that is at hand."""
    named, evaluated = given.pop("dataset", None), given.pop("eval_dataset", None)
    listed = (
        [one.strip() for one in named.split(",")] if isinstance(named, str) else list(named or [])
    )
    known = _info(given, folder)
    if listed:
        arguments.set_sources(draft, [_source(draft, name, known) for name in listed])
        draft.taken += 1
    if evaluated:
        first = str(evaluated).split(",")[0].strip()
        draft.set("data.evaluation", _source(draft, first, known))
        draft.taken += 1


def _info(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    for place in (folder / str(given.get("dataset_dir") or "data"), folder):
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def _source(draft: Draft, name: str, known: dict[str, Any]) -> dict[str, Any]:
    entry = known.get(name)
    if not isinstance(entry, dict):
        draft.differ(
            f"dataset {name}: its file stands in dataset_info.json, which was not at hand; data/{name}.json "
            "is a guess"
        )
        return {"source": "files", "path": f"data/{name}.json"}
    if entry.get("hf_hub_url"):
        return {"source": "hub", "name": str(entry["hf_hub_url"])}
    columns = entry.get("columns") or {}
    if columns.get("images"):
        draft.set("data.image_field", str(columns["images"]))
    if columns.get("messages") not in (None, "conversations", "messages"):
        draft.set("data.messages_field", str(columns["messages"]))
    return {"source": "files", "path": f"data/{entry.get('file_name', f'{name}.json')}"}
