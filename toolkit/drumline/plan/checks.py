"""What a plan refuses: parts of a recipe that do not go together, or not with the model. Pure."""

from collections.abc import Mapping
from typing import Any

from drumline.architectures.gpus import find_gpu
from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.recipe.schema import Recipe

LAUNCHER_STRATEGIES = {
    "torchrun": ("ddp", "fsdp"),
    "accelerate": ("ddp", "fsdp"),
    "deepspeed": ("ddp", "zero1", "zero2", "zero3"),
}

TWO_WAY = {
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
         "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "is_decoder",
    ),
    "xlm": "causal",
}  # fmt: skip
"""Architectures that attend to all tokens of a row, unless this field of their config is true."""


def check_strategy(recipe: Recipe) -> None:
    """Refuse a strategy, launcher, attention or BatchNorm that do not go together, or not with the GPU."""
    legal = LAUNCHER_STRATEGIES[recipe.launch.launcher]
    if recipe.strategy.name not in legal:
        table = " · ".join(f"{name}: {', '.join(s)}" for name, s in LAUNCHER_STRATEGIES.items())
        raise PlanError(
            f"strategy.name: {recipe.strategy.name} does not go with launcher "
            f"{recipe.launch.launcher}. {table}"
        )
    if recipe.launch.launcher == "deepspeed":
        _check_deepspeed(recipe)
    if recipe.model.attention == "flash" and not find_gpu(recipe.cluster.gpu).has_flash:
        raise PlanError(
            f"model.attention: flash needs compute capability 8.0, and {recipe.cluster.gpu_name} is older. "
            "Nearest: sdpa"
        )
    if recipe.logging.noise_scale and recipe.strategy.shard == "node":
        raise PlanError(
            "logging.noise_scale: with strategy.shard node no rank sees the gradient of a micro-batch. "
            "Nearest: strategy.shard=all"
        )
    if recipe.logging.noise_scale and recipe.strategy.reduce == "step":
        raise PlanError(
            "logging.noise_scale: with strategy.reduce step no rank sees the gradient of a micro-batch. "
            "Nearest: strategy.reduce=micro_batch"
        )
    if recipe.model.sync_batchnorm and recipe.strategy.name != "ddp":
        raise PlanError(
            f"model.sync_batchnorm goes with strategy ddp, not {recipe.strategy.name}. "
            "Nearest: strategy.name ddp, or GroupNorm in the model"
        )
    if recipe.model.sync_batchnorm and recipe.cluster.gpu == "cpu":
        raise PlanError(
            "model.sync_batchnorm: torch's SyncBatchNorm needs a GPU, and cluster.gpu is cpu. "
            "Nearest: sync_batchnorm false, or GroupNorm in the model"
        )


WITHOUT_PADDING = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "granite", "phi", "gpt_neox",
                   "starcoder2", "gpt2", "deepseek_v2", "deepseek_v3", "qwen3_moe"}  # fmt: skip
"""Architectures whose config has no `pad_token_id` unless it is stated."""

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length",
                   "max_sequence_length", "seq_length", "max_target_positions")  # fmt: skip
"""Fields of transformers' configs that say how many positions a model has."""

AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet",
                 "data2vec-text", "ibert", "luke", "esm"}  # fmt: skip
"""Architectures whose first position is the one after that of `pad_token_id`."""


def _check_deepspeed(recipe: Recipe) -> None:
    """Refuse recipes that DeepSpeed would train differently from the other launchers."""
    if recipe.model.quantization != "none":
        raise PlanError(
            "model.quantization does not go with launcher deepspeed. Nearest: launch.launcher=torchrun "
            "strategy.name=fsdp"
        )
    if recipe.precision == "bf16-pure":
        raise PlanError(
            "precision: bf16-pure does not go with launcher deepspeed, which keeps an fp32 copy of "
            "bf16 weights. Nearest: bf16, or strategy fsdp with launcher torchrun"
        )
    if recipe.model.sync_batchnorm:
        raise PlanError(
            "model.sync_batchnorm does not go with launcher deepspeed. "
            "Nearest: launcher torchrun, or GroupNorm in the model"
        )


def check_model(recipe: Recipe, architecture: str, config: Mapping[str, Any]) -> None:
    """Refuse a model whose config says that it would not be trained as it is meant to be.

    `config`: the recipe's, on top of that of a pretrained model.
    """
    is_language_model = recipe.data.facts.head == "causal_lm" and recipe.data.task != "custom"
    key = TWO_WAY.get(architecture)
    if is_language_model and key and not config.get(key):
        raise PlanError(
            f"model.config.{key}: not set, so {architecture} attends to the tokens that it should predict. "
            f"Nearest: model.config.{key}=true, or a decoder such as gpt2"
        )
    if recipe.data.task == "masked_lm" and key and config.get(key):
        raise PlanError(
            f"model.config.{key}: set, so {architecture} does not attend to the tokens after a masked one. "
            f"Nearest: model.config.{key}=false"
        )
    if config.get("output_router_logits"):
        raise PlanError(
            "model.config.output_router_logits: the auxiliary loss of the router is not part of the loss. "
            "Nearest: model.config.output_router_logits=false"
        )
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    least = -1 if is_language_model else 0  # old Llama configs state -1 for none
    if isinstance(pad, int) and isinstance(vocabulary, int) and not least <= pad < vocabulary:
        raise PlanError(
            f"model.config.pad_token_id: {pad} is not one of {vocabulary} tokens. "
            f"Nearest: {max(0, min(pad, vocabulary - 1))}"
        )


PACKABLE = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granite", "smollm3",
            "olmo2", "gemma", "gemma2", "gemma3_text", "cohere", "phi", "phi3", "gpt_neox",
            "starcoder2", "gpt2"}  # fmt: skip
"""Architectures whose attention stays within a document if positions begin anew with each
(`tests/train/test_packed_documents.py`)."""


def check_packing(recipe: Recipe, architecture: str) -> None:
    """Refuse documents side by side in a row where the model would let them see each other."""
    if not recipe.data.packs_documents:
        return
    nearest = "stream" if recipe.data.task == "causal_lm" else "none"
    if recipe.model.source == "factory" or architecture not in PACKABLE:
        raise PlanError(
            f"data.packing: documents: {architecture or recipe.model.factory} is not known to keep documents "
            f"of a row apart. Nearest: data.packing={nearest}"
        )
    if recipe.model.attention == "flash":
        raise PlanError(
            "data.packing: documents are kept apart by sdpa and eager attention. Nearest: "
            "model.attention=sdpa"
        )


def check_padding(
    recipe: Recipe, architecture: str, config: Mapping[str, Any], per_device: int
) -> None:
    """Refuse a classifier that could not tell the last token of a row from its padding."""
    has_none = config.get("pad_token_id") is None and architecture in WITHOUT_PADDING
    if has_none and recipe.data.facts.head == "classification" and per_device != 1:
        raise no_padding(architecture)


def no_padding(architecture: str) -> PlanError:
    """The refusal of a classifier of padded rows whose config has no `pad_token_id`."""
    return PlanError(
        f"model.config.pad_token_id: {architecture} has none, so a classifier cannot tell the last token "
        "of a row from its padding. Nearest: model.config.pad_token_id=0"
    )


def check_positions(
    recipe: Recipe, architecture: str, config: Mapping[str, Any], row_tokens: int | None
) -> None:
    """Refuse rows that are longer than the positions that the config of an unknown architecture states.

    `row_tokens`: of the longest prepared row, None if that is not known.
    """
    stated = {key: config[key] for key in POSITION_FIELDS if isinstance(config.get(key), int)}
    positive = {key: value for key, value in stated.items() if value > 0}
    if not positive:
        return
    key, whole = min(positive.items(), key=lambda item: item[1])
    padding = config.get("pad_token_id", 1) or 0
    unused = padding + 1 if architecture in AFTER_PADDING else 0
    limit, length = whole - unused, recipe.data.sequence_length or row_tokens
    if length and length > limit:
        found = length if recipe.data.sequence_length else f"not set, and a row has {length} tokens"
        raise PlanError(
            f"data.sequence_length: {found} > {limit} positions ({key} {whole}). "
            f"Nearest: sequence_length {limit}, or model.config.{key} {length + unused}"
        )


def check_pairs(recipe: Recipe, sequences: int | None) -> None:
    """Refuse an objective of pairs for labelled rows, and one of labelled rows for pairs.

    `sequences`: of tokens that a prepared row holds, None if that is not known.
    """
    is_unpaired = recipe.objective.facts.unpaired
    if sequences is None or is_unpaired is None or is_unpaired == (sequences == 1):
        return
    rows, name, other = (
        ("pairs of completions", "learns from single ones with a label", "dpo")
        if is_unpaired
        else ("single completions with a label", "compares two", "kto")
    )
    raise PlanError(
        f"objective.name: {recipe.objective.name} {name}, and the prepared rows are {rows}. Nearest: "
        f"objective.name={other}"
    )


def check_image(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse images of another size or number of channels than the model's config states."""
    spec = recipe.data.image
    if spec is None:
        return
    config = {**config, **(config.get("vision_config") or {})}
    channels = config.get("num_channels", spec.channels if recipe.model.factory else 3)
    if channels != spec.channels:
        raise PlanError(
            f"data.image.channels: {spec.channels}, and the model reads {channels}. Nearest: "
            f"data.image.channels={channels}, or model.config.num_channels={spec.channels}"
        )
    size = config.get("image_size")
    if spec.size is None or size is None:
        return
    ours, theirs = ([one, one] if isinstance(one, int) else list(one) for one in (spec.size, size))
    if ours != theirs:
        raise PlanError(
            f"data.image.size: {spec.size}, and the model reads {size}. Nearest: data.image.size={size}, or "
            f"model.config.image_size={spec.size}"
        )


def check_shape(recipe: Recipe, shape: ModelShape | str, row_tokens: int | None) -> None:
    """Refuse what this model cannot do, or what would train another model than its config states.

    `shape`: or why there is none. `row_tokens`: of the longest prepared row, None if that is not known.
    """
    if isinstance(shape, str):
        if recipe.loss.chunked and recipe.model.source != "factory":
            raise PlanError(
                f"loss.chunked: {shape}, so what the model does to its logits may be missing from the loss. "
                "Nearest: loss.chunked=false"
            )
        return
    architecture = shape.architecture
    stated = recipe.data.sequence_length
    length = stated or row_tokens
    limit = shape.positions - shape.unused_positions if shape.positions else None
    if limit and length and length > limit:
        key = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
        found = length if stated else f"not set, and a row has {length} tokens"
        raise PlanError(
            f"data.sequence_length: {found} > {limit} positions that the model learns. "
            f"Nearest: sequence_length {limit}, or model.config.{key} {length}"
        )
    if shape.structure.caps_scores and recipe.model.attention == "sdpa":
        raise PlanError(
            f"model.attention: {architecture} caps its attention scores, which torch's sdpa cannot. "
            "Nearest: model.attention=eager"
        )
    if shape.structure.logit_operations and recipe.loss.chunked:
        raise PlanError(
            f"loss.chunked: {architecture} scales or caps its logits, and the chunked loss would not. "
            "Nearest: loss.chunked=false"
        )


def check_weights(
    recipe: Recipe, shape: ModelShape, weights: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse files that do not hold the weights of the model that their config describes."""
    from drumline.architectures.weight_names import problem_with

    found = problem_with(shape, weights, recipe.data.facts.has_labels)
    if found:
        raise PlanError(
            f"model: the weights of {recipe.model.name or recipe.model.path} are not those of its config: "
            f"{found}. Nearest: the folder that the model was saved to with save_pretrained"
        )
