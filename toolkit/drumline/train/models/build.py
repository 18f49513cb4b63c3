"""Builds the recipe's model: on the meta device, but for a factory's, which has its weights already."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drumline.architectures.fields import refuse_near_misses
from drumline.architectures.hub import cached_folder
from drumline.architectures.labels import number_of_labels
from drumline.architectures.weight_files import dtypes_in, fingerprint_of
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.plan.checks import no_padding
from drumline.recipe.schema import Recipe
from drumline.train.models.masks import answer_without_looking
from drumline.train.models.pretrained import PretrainedWeights
from drumline.train.models.seeds import derived_seed

ATTENTION = {"sdpa": None, "eager": "eager", "flash": "flash_attention_2"}
"""transformers' names. None is sdpa, or the attention of the model's own where that is all it has."""


@dataclass(frozen=True)
class Built:
    """A model before its edits; `weights`: what it is to be filled from, None where it is drawn."""

    model: nn.Module
    weights: PretrainedWeights | None = None


def build_model(recipe: Recipe, manifest: DatasetManifest) -> Built:
    """The model before its edits; PlanError where recipe, config and data do not fit together."""
    if recipe.model.source == "factory":
        return Built(_from_factory(recipe))
    answer_without_looking()
    if recipe.model.source == "config":
        return Built(_from_config(recipe, manifest))
    return _from_weights(recipe, manifest)


def _from_factory(recipe: Recipe) -> nn.Module:
    spec = recipe.model
    assert spec.factory
    torch.manual_seed(derived_seed("init", recipe.seed, "factory"))
    try:
        model: nn.Module = load_factory(spec.factory, recipe.project)(**spec.config)
    except TypeError as error:
        raise PlanError(
            f"model.config: {spec.config} does not suit {spec.factory}: {error}"
        ) from None
    return model


def _from_config(recipe: Recipe, manifest: DatasetManifest) -> nn.Module:
    """A model on the meta device."""
    import transformers

    spec = recipe.model
    assert spec.architecture
    kind = _kind(recipe, spec.architecture)
    fields = _fields(recipe, None, manifest)
    try:
        known = transformers.AutoConfig.for_model(spec.architecture)
        refuse_near_misses(spec.config, set(known.to_dict()) | set(known.attribute_map))
        config = transformers.AutoConfig.for_model(spec.architecture, **fields)
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"model.architecture: {spec.architecture}: {_first_line(error)}") from None
    _check_padding(recipe, config)
    try:
        return _on_meta(kind, config, recipe)
    except (ValueError, ImportError) as error:
        raise PlanError(f"model: {spec.architecture}: {_first_line(error)}") from None


def _on_meta(kind: Any, config: Any, recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return kind.from_config(  # type: ignore[no-any-return]
            config, dtype=torch.float32, attn_implementation=ATTENTION[recipe.model.attention]
        )


def _from_weights(recipe: Recipe, manifest: DatasetManifest) -> Built:
    """A pretrained model, of a folder or of the hub."""
    import transformers

    spec = recipe.model
    folder = _folder_of(recipe)
    where = str(folder)
    try:
        saved = transformers.PreTrainedConfig.get_config_dict(where)[0]
        config = transformers.AutoConfig.from_pretrained(
            where, trust_remote_code=False, **_fields(recipe, saved, manifest)
        )
        kind = _kind(recipe, config.model_type)
        _check_padding(recipe, config)
        form = _on_meta(kind, config, recipe)
    except (OSError, ValueError, ImportError) as error:
        key = "name" if spec.name else "path"
        raise PlanError(f"model.{key}: {where}: {_first_line(error)}") from None
    weights = PretrainedWeights(form, folder, has_new_head=recipe.data.facts.has_labels)
    return Built(_on_meta(kind, config, recipe), weights)


def _folder_of(recipe: Recipe) -> Path:
    """The folder of a pretrained model; one of the hub was fetched before."""
    spec = recipe.model
    if spec.path:
        return Path(spec.path)
    assert spec.name
    folder = cached_folder(spec.name, spec.revision)
    if folder is None:
        raise PlanError(f"model.name: {spec.name} is not in the cache. Nearest: drumline prepare")
    return folder


def base_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the pretrained weights under an adapter, which its checkpoints do not hold; else ""."""
    return "" if recipe.model.adapter is None else weights_fingerprint(recipe)


def weights_fingerprint(recipe: Recipe) -> str:
    """Fingerprint of the pretrained weights that training begins with; "" where they are random."""
    if recipe.model.source not in ("folder", "hub"):
        return ""
    return fingerprint_of(_folder_of(recipe))


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that most of a pretrained model's weights have in its files; float32 for other models."""
    if recipe.model.source not in ("folder", "hub"):
        return torch.float32
    names = dtypes_in(_folder_of(recipe))
    return getattr(
        torch, {"BF16": "bfloat16", "F16": "float16"}.get(names[0] if names else "", "float32")
    )  # type: ignore[no-any-return]


def _check_padding(recipe: Recipe, config: Any) -> None:
    """PlanError where a classifier could not tell the last token of a row from its padding."""
    is_text = recipe.data.facts.head == "classification" and not recipe.data.audio
    is_text = is_text and not reads_images(config.model_type)
    if is_text and config.pad_token_id is None and recipe.batch.per_device != 1:
        raise no_padding(config.model_type)


def _fields(
    recipe: Recipe, saved: dict[str, Any] | None, manifest: DatasetManifest
) -> dict[str, Any]:
    """Fields of the config that the recipe and the data set; `saved`: config.json of a pretrained model."""
    fields = dict(recipe.model.config)
    if recipe.data.facts.has_labels:
        problem = recipe.data.facts.problem
        labels = number_of_labels(fields, saved, manifest.classes, problem)
        if problem:
            fields.setdefault("problem_type", problem)
        if labels and not (saved and labels == len(saved.get("id2label") or ())):
            names = manifest.class_names if labels == len(manifest.class_names or ()) else None
            if names and "id2label" not in fields:
                fields["id2label"] = dict(enumerate(names))
                fields["label2id"] = {name: number for number, name in enumerate(names)}
            else:
                fields["num_labels"] = labels  # else the names of the saved labels stay
    if saved and "pretrained_cfg" in saved:  # timm is given the number of classes by itself
        stated = saved.get("model_args") or {}
        fields["model_args"] = {key: v for key, v in stated.items() if key != "num_classes"}
        if "id2label" in fields:
            names = list(fields["id2label"].values())
            fields |= {"num_labels": len(names), "label_names": names}
    # Keys and values would be copied into a cache that training never reads.
    fields.setdefault("use_cache", False)
    return fields


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


_AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def _kind(recipe: Recipe, model_type: str) -> Any:
    """The transformers auto class of this task for a model of this type."""
    import transformers

    head = recipe.data.facts.head
    if recipe.data.is_chat_with_images:
        return transformers.AutoModelForImageTextToText
    if recipe.data.audio:
        speech = head == "seq2seq"
        return getattr(
            transformers, f"AutoModelFor{'SpeechSeq2Seq' if speech else 'AudioClassification'}"
        )
    if head == "classification" and reads_images(model_type):
        return transformers.AutoModelForImageClassification
    return getattr(transformers, _AUTO_CLASSES[head])


def reads_images(model_type: str) -> bool:
    """Whether transformers has a classifier of images for this type of model, and none of texts."""
    from transformers.models.auto import modeling_auto as auto

    reads_text = model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return not reads_text and model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def check_vocabulary(model: Any, manifest: DatasetManifest, is_pretrained: bool) -> None:
    """Raise PlanError where the tokenizer's vocabulary is larger than the model's."""
    config: Any = getattr(model, "config", None)
    of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(of_text, "vocab_size", None)
    if (
        vocabulary is not None
        and manifest.vocabulary is not None
        and manifest.vocabulary > vocabulary
    ):
        fix = f"vocab_size {-(-manifest.vocabulary // 64) * 64}"
        if is_pretrained:  # its files' embeddings have one size only
            fix = "data.tokenizer, the one that the model was trained with"
        raise PlanError(
            f"model.config.vocab_size: {vocabulary} < {manifest.vocabulary} tokens of the tokenizer. "
            f"Nearest: {fix}"
        )
