"""Reads a ModelShape from a transformers config, for the known architectures. Pure.

Defaults are those of the config classes of transformers 5; a test compares every parameter count with the
real model built on the meta device.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from drumline.architectures.shapes import ACTIVATIONS, ModelShape
from drumline.architectures.structures import DECODERS, Decoder
from drumline.errors import PlanError

GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

_COMMON_KEYS = ("vocab_size", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_labels",
                "num_attention_heads", "max_position_embeddings", "hidden_act")  # fmt: skip
_GPT2_KEYS = (*_COMMON_KEYS, *GPT2_DROPOUTS, "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
              "activation_function")  # fmt: skip
_DECODER_KEYS = (*_COMMON_KEYS, "intermediate_size", "num_key_value_heads", "head_dim", "sliding_window",
                 "partial_rotary_factor", "layer_types", "no_rope_layers", "no_rope_layer_interval",
                 "num_local_experts", "num_experts", "num_experts_per_tok",
                 "moe_intermediate_size")  # fmt: skip
_ROBERTA_VOCABULARIES = {"roberta": 50265, "xlm-roberta": 30522, "camembert": 30522}
"""Default vocabularies of BERT's relatives. Their positions begin after that of the padding token."""
_DISTILBERT_NAMES = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
                     "num_attention_heads": "n_heads", "hidden_dropout_prob": "dropout",
                     "attention_probs_dropout_prob": "attention_dropout"}  # fmt: skip
"""DistilBERT's own names of what BERT's config has."""
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
    keys, key, activation, read = _READERS[architecture]
    refuse_near_misses(config, keys)
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


def _decoder(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    """The shape of a decoder of the table in `structures.py`."""
    family = DECODERS[architecture]
    for key, needed in family.needs.items():
        value = config.get(key, needed)
        is_any_number = isinstance(needed, float) and bool(needed) and bool(value)
        if value != needed and not is_any_number:
            return f"no closed form for {architecture} with {key} {value}"
    values = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    if config.get("num_key_value_heads", 1) is None:  # transformers: one for each attention head
        values.pop("num_key_value_heads", None)
    for common, own in family.names.items():
        values[common] = values.get(own, values.get(common))
    h = _whole(values, ("hidden_size",), None)
    for key in family.as_wide:
        if values.get(key, h) != h:
            return f"no closed form for {architecture} with {key} {values[key]}"
    heads = _whole(values, ("num_attention_heads",), None)
    kv_heads = _whole(values, ("num_key_value_heads",), heads)
    if heads % kv_heads:
        raise PlanError(
            f"model.config.num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    if values.get("head_dim") is None:
        _refuse_remainder(h, heads)
    head_dim = _whole(values, ("head_dim",), h // heads)
    layers = _whole(values, ("num_hidden_layers",), None)
    qkv, out, feed_forward = (
        key if isinstance(key, bool) else bool(values.get(key, False)) for key in family.biases
    )
    positions = None
    if family.extra_positions:
        positions = _whole(values, ("max_position_embeddings",), None) + family.extra_positions
    shape = ModelShape(
        family="decoder",
        architecture=architecture,
        hidden=h,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        kv_width=kv_heads * head_dim,
        ffn=_whole(values, ("intermediate_size",), None),
        vocabulary=_whole(values, ("vocab_size",), None),
        tied=bool(values.get("tie_word_embeddings", False)),
        dropout=max(_share(values, key, 0.0) for key in family.dropouts),
        positions=positions,
        unused_positions=family.extra_positions,
        classes=classes,
        window=_window(family, config),
        has_qkv_bias=qkv,
        has_out_bias=out,
        has_mlp_bias=feed_forward,
        has_head_bias=family.has_head_bias,
        structure=family.structure,
        rotary_share=_rotary_share(values),
        windowed=_windowed(family, values, layers),
        rotated=_rotated(family, values, layers),
    )
    return _with_experts(shape, values) if "num_local_experts" in family.defaults else shape


def _window(family: Decoder, config: dict[str, Any]) -> int | None:
    """The sliding window in tokens; None without one, or where the config keeps it switched off."""
    if "use_sliding_window" in family.needs:
        return None
    window: int | None = config.get("sliding_window", family.window)
    return window


def _rotary_share(values: dict[str, Any]) -> float:
    """The share of a head's features with rotary positions."""
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    return float(values.get("rotary_pct", share))


def _windowed(family: Decoder, values: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer has the sliding window; empty if all are alike."""
    kinds = _of_each_layer(values, "layer_types", layers)
    if kinds:
        return tuple(kind == "sliding_attention" for kind in kinds)
    keys = ("_sliding_window_pattern", "sliding_window_pattern")
    return _all_but_every(values, keys, family.full_every, layers)


def _rotated(family: Decoder, values: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer has rotary positions; empty if all have."""
    stated = _of_each_layer(values, "no_rope_layers", layers)
    if stated:
        return tuple(bool(has) for has in stated)
    return _all_but_every(values, ("no_rope_layer_interval",), family.rotary_every, layers)


def _of_each_layer(values: dict[str, Any], key: str, layers: int) -> list[Any]:
    """A list of the config with an entry for each layer; empty if it is not set."""
    found: list[Any] = values.get(key) or []
    if found and len(found) != layers:
        raise PlanError(
            f"model.config.{key}: {len(found)} entries for {layers} layers. Nearest: state {layers}"
        )
    return found


def _all_but_every(
    values: dict[str, Any], keys: tuple[str, ...], default: int, layers: int
) -> tuple[bool, ...]:
    """False for every n-th layer, n the value of the first key that is set; empty for other families."""
    if not default:
        return ()
    every = _whole(values, keys, default)
    return tuple((number + 1) % every != 0 for number in range(layers))


def _with_experts(dense: ModelShape, values: dict[str, Any]) -> ModelShape:
    experts = _whole(values, ("num_experts", "num_local_experts"), None)
    top_k = _whole(values, ("num_experts_per_tok",), None)
    if top_k > experts:
        raise PlanError(
            f"model.config.num_experts_per_tok: {top_k} > {experts} experts. Nearest: {experts}"
        )
    ffn = _whole(values, ("moe_intermediate_size",), dense.ffn)
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
    is_roberta = architecture in _ROBERTA_VOCABULARIES
    return _encoder(
        "bert",
        architecture,
        config,
        classes,
        dropout=0.1,
        vocabulary=_whole(config, ("vocab_size",), _ROBERTA_VOCABULARIES.get(architecture, 30522)),
        positions=_whole(config, ("max_position_embeddings",), 512),
        unused_positions=(config.get("pad_token_id") or 0) + 1 if is_roberta else 0,
        types=_whole(config, ("type_vocab_size",), 2),
        has_embedding_block=True,
        has_qkv_bias=True,
    )


def _distilbert(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    if classes is None:
        return f"no closed form for {architecture} as a language model"
    if config.get("sinusoidal_pos_embds"):
        return f"no closed form for {architecture} with sinusoidal_pos_embds"
    common = {name: config[own] for name, own in _DISTILBERT_NAMES.items() if own in config}
    return _encoder(
        "bert",
        architecture,
        {"num_hidden_layers": 6, **common},
        classes,
        dropout=0.1,
        vocabulary=_whole(config, ("vocab_size",), 30522),
        positions=_whole(config, ("max_position_embeddings",), 512),
        has_qkv_bias=True,
        drops_attention=False,
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
        has_embedding_block=True,
        has_qkv_bias=bool(config.get("qkv_bias", True)),
    )


Reader = Callable[[str, dict[str, Any], int | None], ModelShape | str]

_READERS: dict[str, tuple[tuple[str, ...], str, str, Reader]] = {
    "gpt2": (_GPT2_KEYS, "activation_function", "gelu_new", _gpt2),
    **dict.fromkeys(("bert", *_ROBERTA_VOCABULARIES), (_BERT_KEYS, "hidden_act", "gelu", _bert)),
    "distilbert": ((*_DISTILBERT_NAMES.values(), "vocab_size", "max_position_embeddings", "activation",
                    "sinusoidal_pos_embds"), "activation", "gelu", _distilbert),
    "vit": (_VIT_KEYS, "hidden_act", "gelu", _vit),
    **{
        name: ((*_DECODER_KEYS, *family.dropouts, *family.needs, family.activation_key),
               family.activation_key, family.activation, _decoder)
        for name, family in DECODERS.items()
    },
}  # fmt: skip
"""By architecture: known config keys, the key and the default of the activation, the reader of the shape."""
