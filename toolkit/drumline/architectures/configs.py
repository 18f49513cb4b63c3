"""Reads a ModelShape from a transformers config, for the known architectures. Pure.

Defaults are those of the config classes of transformers 5; a test compares every parameter count with the
real model built on the meta device.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from drumline.architectures.shapes import ACTIVATIONS, ModelShape
from drumline.errors import PlanError

GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

_LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "head_dim": 128},
    "mixtral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
                "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"vocab_size": 151936, "intermediate_size": 6144, "num_key_value_heads": 4,
                  "hidden_size": 2048, "num_hidden_layers": 24, "num_local_experts": 128,
                  "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}  # fmt: skip
_COMMON_KEYS = ("vocab_size", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_labels",
                "num_attention_heads", "max_position_embeddings", "hidden_act")  # fmt: skip
_GPT2_KEYS = (*_COMMON_KEYS, *GPT2_DROPOUTS, "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
              "activation_function")  # fmt: skip
_LLAMA_KEYS = (*_COMMON_KEYS, "intermediate_size", "num_key_value_heads", "head_dim", "attention_bias",
               "mlp_bias", "attention_dropout", "sliding_window", "use_sliding_window")  # fmt: skip
_MOE_KEYS = (*_LLAMA_KEYS, "num_local_experts", "num_experts", "num_experts_per_tok",
             "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers")  # fmt: skip
_BERT_KEYS = (*_COMMON_KEYS, *BERT_DROPOUTS, "intermediate_size", "type_vocab_size")
_VIT_KEYS = (*_COMMON_KEYS, *BERT_DROPOUTS, "intermediate_size", "image_size", "patch_size", "num_channels",
             "qkv_bias")  # fmt: skip


def read_shape(
    architecture: str, config: dict[str, Any], classes: int | None = None
) -> ModelShape | str:
    """The model's shape, or a text that says why it is not known (then its memory is not known either).

    `classes`: number of classes of a classifier; None for a language model. Raises PlanError for a value
    that is not legal, or a key that looks like a misspelt known one.
    """
    if architecture not in _READERS:
        return f"no closed form for {architecture}"
    keys, activation, read = _READERS[architecture]
    refuse_near_misses(config, keys)
    key = "activation_function" if "activation_function" in keys else "hidden_act"
    activation = config.get(key, activation)
    if activation not in ACTIVATIONS:
        return f"no closed form for {architecture} with {key} {activation}"
    shape = read(architecture, config, classes)
    return shape if isinstance(shape, str) else replace(shape, activation=activation)


def refuse_near_misses(config: dict[str, Any], known: Collection[str]) -> None:
    """Raise PlanError for keys that look misspelt; transformers would silently ignore them."""
    for key in config:
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(key, known, n=1, cutoff=0.88)
            if close:
                raise PlanError(f"model.config.{key}: unknown key. Did you mean {close[0]!r}?")


def _whole(config: dict[str, Any], keys: tuple[str, ...], default: int | None) -> int:
    """The value of the first key that is set, or the default; raises PlanError if not a positive integer."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"model.config.{key}: {value!r} is not a whole number above 0")
            return value
    assert default is not None
    return default


def _share(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise PlanError(f"model.config.{key}: {value!r} is not a number from 0 to below 1")
    return float(value)


def _refuse_remainder(hidden: int, heads: int) -> None:
    if hidden % heads:
        raise PlanError(
            f"model.config: {hidden} hidden / {heads} heads = {hidden / heads:.2f}, not a whole "
            f"number. Nearest: {hidden // heads * heads or heads} or {(hidden // heads + 1) * heads}"
        )


def _gpt2(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    for key in ("add_cross_attention", "reorder_and_upcast_attn"):
        if config.get(key):
            return f"no closed form for {architecture} with {key}"
    h = _whole(config, ("n_embd", "hidden_size"), 768)
    heads = _whole(config, ("n_head", "num_attention_heads"), 12)
    _refuse_remainder(h, heads)
    return ModelShape(
        family="gpt2",
        architecture=architecture,
        hidden=h,
        layers=_whole(config, ("n_layer", "num_hidden_layers"), 12),
        heads=heads,
        head_dim=h // heads,
        kv_width=h,
        ffn=_whole(config, ("n_inner",), 4 * h),
        vocabulary=_whole(config, ("vocab_size",), 50257),
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout=max(_share(config, key, 0.1) for key in GPT2_DROPOUTS),
        positions=_whole(config, ("n_positions", "max_position_embeddings"), 1024),
        classes=classes,
    )


def _llama_or_why_not(
    architecture: str, config: dict[str, Any], classes: int | None
) -> ModelShape | str:
    if architecture.startswith("qwen") and config.get("use_sliding_window"):
        return f"no closed form for {architecture} with use_sliding_window"
    return _llama(architecture, config, classes)


def _llama(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape:
    defaults = _LLAMA_DEFAULTS[architecture]
    h = _whole(config, ("hidden_size",), defaults.get("hidden_size", 4096))
    heads = _whole(config, ("num_attention_heads",), 32)
    kv_heads = _whole(config, ("num_key_value_heads",), defaults["num_key_value_heads"] or heads)
    if heads % kv_heads:
        raise PlanError(
            f"model.config.num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    if "head_dim" not in defaults and config.get("head_dim") is None:
        _refuse_remainder(h, heads)
    head_dim = _whole(config, ("head_dim",), defaults.get("head_dim") or h // heads)
    is_qwen3 = architecture in ("qwen3", "qwen3_moe")
    can_have_bias = architecture in ("llama", "qwen3", "qwen3_moe")
    biased = bool(config.get("attention_bias")) and can_have_bias
    window = None
    if architecture in ("mistral", "mixtral"):
        window = config.get("sliding_window", 4096 if architecture == "mistral" else None)
    return ModelShape(
        family="llama",
        architecture=architecture,
        hidden=h,
        layers=_whole(config, ("num_hidden_layers",), defaults.get("num_hidden_layers", 32)),
        heads=heads,
        head_dim=head_dim,
        kv_width=kv_heads * head_dim,
        ffn=_whole(config, ("intermediate_size",), defaults["intermediate_size"]),
        vocabulary=_whole(config, ("vocab_size",), defaults["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        dropout=_share(config, "attention_dropout", 0.0),
        classes=classes,
        window=window,
        has_qk_norm=is_qwen3,
        has_qkv_bias=biased or architecture == "qwen2",
        has_out_bias=biased,
        has_mlp_bias=bool(config.get("mlp_bias")) and architecture == "llama",
    )


def _moe(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    if architecture.startswith("qwen") and config.get("use_sliding_window"):
        return f"no closed form for {architecture} with use_sliding_window"
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        return f"no closed form for {architecture} with layers that have no experts"
    defaults = _LLAMA_DEFAULTS[architecture]
    dense = _llama(architecture, config, classes)
    ffn = dense.ffn
    if "moe_intermediate_size" in defaults:
        ffn = _whole(config, ("moe_intermediate_size",), defaults["moe_intermediate_size"])
    experts = _whole(config, ("num_local_experts", "num_experts"), defaults["num_local_experts"])
    top_k = _whole(config, ("num_experts_per_tok",), defaults["num_experts_per_tok"])
    if top_k > experts:
        raise PlanError(
            f"model.config.num_experts_per_tok: {top_k} > {experts} experts. Nearest: {experts}"
        )
    return replace(dense, ffn=ffn, experts=experts, top_k=top_k)


def _encoder(family: str, architecture: str, config: dict[str, Any], classes: int,
             dropout: float, **its_own: Any) -> ModelShape:  # fmt: skip
    """The shape of BERT or ViT from the config keys that both share; `dropout` is the default."""
    h = _whole(config, ("hidden_size",), 768)
    heads = _whole(config, ("num_attention_heads",), 12)
    _refuse_remainder(h, heads)
    return ModelShape(
        family=family,
        architecture=architecture,
        hidden=h,
        layers=_whole(config, ("num_hidden_layers",), 12),
        heads=heads,
        head_dim=h // heads,
        kv_width=h,
        ffn=_whole(config, ("intermediate_size",), 3072),
        tied=True,
        dropout=max(_share(config, key, dropout) for key in BERT_DROPOUTS),
        classes=classes,
        **its_own,
    )


def _bert(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    if classes is None:
        return f"no closed form for {architecture} as a language model"
    if config.get("type_vocab_size", 2) != 2:
        return f"no closed form for {architecture} with type_vocab_size other than 2"
    return _encoder(
        "bert",
        architecture,
        config,
        classes,
        dropout=0.1,
        vocabulary=_whole(config, ("vocab_size",), 30522),
        positions=_whole(config, ("max_position_embeddings",), 512),
        has_qkv_bias=True,
    )


def _vit(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    if classes is None:
        return f"no closed form for {architecture} as a language model"
    image = _whole(config, ("image_size",), 224)
    patch = _whole(config, ("patch_size",), 16)
    return _encoder(
        "vit",
        architecture,
        config,
        classes,
        dropout=0.0,
        vocabulary=0,
        patches=(image // patch) ** 2,
        patch_inputs=patch * patch * _whole(config, ("num_channels",), 3),
        has_qkv_bias=bool(config.get("qkv_bias", True)),
    )


Reader = Callable[[str, dict[str, Any], int | None], ModelShape | str]

_READERS: dict[str, tuple[tuple[str, ...], str, Reader]] = {
    "gpt2": (_GPT2_KEYS, "gelu_new", _gpt2),
    "llama": (_LLAMA_KEYS, "silu", _llama_or_why_not),
    "mistral": (_LLAMA_KEYS, "silu", _llama_or_why_not),
    "qwen2": (_LLAMA_KEYS, "silu", _llama_or_why_not),
    "qwen3": (_LLAMA_KEYS, "silu", _llama_or_why_not),
    "mixtral": (_MOE_KEYS, "silu", _moe),
    "qwen3_moe": (_MOE_KEYS, "silu", _moe),
    "bert": (_BERT_KEYS, "gelu", _bert),
    "vit": (_VIT_KEYS, "gelu", _vit),
}
"""By architecture: known config keys, the default activation, and the reader of the shape."""
