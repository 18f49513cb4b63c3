"""Builds the recipe's model: on the meta device if its weights are initialised later, else with weights."""

from typing import Any

import torch
from torch import nn

from drumline.architectures.fields import refuse_near_misses
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.factory import load_factory
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe
from drumline.train.models.masks import answer_without_looking
from drumline.train.models.seeds import derived_seed

ATTENTION = {"sdpa": None, "eager": "eager", "flash": "flash_attention_2"}
"""transformers' names. None is sdpa, or the attention of the model's own where that is all it has."""


def build_model(recipe: Recipe, manifest: DatasetManifest) -> nn.Module:
    """The model before its edits; PlanError where recipe, config and data do not fit together."""
    spec = recipe.model
    if spec.source == "factory":
        assert spec.factory
        torch.manual_seed(derived_seed("init", recipe.seed, "factory"))
        try:
            model: nn.Module = load_factory(spec.factory, recipe.project)(**spec.config)
        except TypeError as error:
            raise PlanError(
                f"model.config: {spec.config} does not suit {spec.factory}: {error}"
            ) from None
        return model
    import transformers

    answer_without_looking()
    common: dict[str, Any] = {"attn_implementation": ATTENTION[spec.attention]}
    extra = dict(spec.config)
    if recipe.data.facts.head == "classification":
        extra.setdefault("num_labels", manifest.classes)
    extra.setdefault(
        "use_cache", False
    )  # else keys and values are copied into a cache that training never reads
    if spec.source == "config":
        assert spec.architecture
        kind = _kind(recipe.data.facts.head, spec.architecture)
        try:
            known = transformers.AutoConfig.for_model(spec.architecture)
            refuse_near_misses(spec.config, set(known.to_dict()) | set(known.attribute_map))
            config = transformers.AutoConfig.for_model(spec.architecture, **extra)
        except (ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise PlanError(f"model.architecture: {spec.architecture}: {first}") from None
        try:
            with torch.device("meta"):
                return kind.from_config(config, dtype=torch.float32, **common)  # type: ignore[no-any-return]
        except ValueError as error:
            first = str(error).strip().splitlines()[0][:300]
            raise PlanError(f"model: {spec.architecture}: {first}") from None
    where = spec.name or spec.path
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
        kind = _kind(recipe.data.facts.head, config.model_type)
        return load_weights(kind, where, config, common)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise PlanError(f"model.{'name' if spec.name else 'path'}: {where}: {first}") from None


def _kind(head: str, model_type: str) -> Any:
    """The transformers auto class for this head on a model of this type."""
    import transformers

    if head != "classification":
        return transformers.AutoModelForCausalLM
    if reads_images(model_type):
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForSequenceClassification


def reads_images(model_type: str) -> bool:
    """Whether transformers has a classifier of images for this type of model, and none of texts."""
    from transformers.models.auto import modeling_auto as auto

    reads_text = model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return not reads_text and model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def load_weights(kind: Any, where: Any, config: Any, common: dict[str, Any]) -> nn.Module:
    """A pretrained model with its weights, from safetensors only."""
    return kind.from_pretrained(  # type: ignore[no-any-return]
        where,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        **common,
    )


def check_vocabulary(model: Any, manifest: DatasetManifest) -> None:
    """Raise PlanError where the tokenizer's vocabulary is larger than the model's."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if (
        vocabulary is not None
        and manifest.vocabulary is not None
        and manifest.vocabulary > vocabulary
    ):
        raise PlanError(
            f"model.config.vocab_size: {vocabulary} < {manifest.vocabulary} tokens of the tokenizer. "
            f"Nearest: vocab_size {-(-manifest.vocabulary // 64) * 64}"
        )
