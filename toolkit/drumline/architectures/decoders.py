"""Reads the shapes of GPT-2 and of the decoders in `structures.py` from their configs. Pure."""

from dataclasses import replace
from typing import Any

from drumline.architectures.fields import Reading, differing, refuse_remainder, share, whole
from drumline.architectures.shapes import Latent, ModelShape
from drumline.architectures.structures import DECODERS, Decoder
from drumline.errors import PlanError

GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")

_COMMON_KEYS = ("vocab_size", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_labels",
                "num_attention_heads", "max_position_embeddings", "hidden_act")  # fmt: skip
_GPT2_KEYS = (*_COMMON_KEYS, *GPT2_DROPOUTS, "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
              "activation_function")  # fmt: skip
_DECODER_KEYS = (*_COMMON_KEYS, "intermediate_size", "num_key_value_heads", "head_dim", "sliding_window",
                 "partial_rotary_factor", "layer_types", "no_rope_layers", "no_rope_layer_interval",
                 "num_local_experts", "num_experts", "num_experts_per_tok",
                 "moe_intermediate_size")  # fmt: skip

_NULL_IS_A_VALUE = ("q_lora_rank", "num_key_value_heads", "sliding_window")
"""Where null is no other word for the default: none, one for each attention head, none."""


def _gpt2(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    for key in ("add_cross_attention", "reorder_and_upcast_attn"):
        if config.get(key):
            return f"no closed form for {architecture} with {key}"
    h = whole(config, ("n_embd", "hidden_size"), 768)
    heads = whole(config, ("n_head", "num_attention_heads"), 12)
    refuse_remainder(h, heads)
    return ModelShape(
        family="gpt2",
        architecture=architecture,
        hidden=h,
        layers=whole(config, ("n_layer", "num_hidden_layers"), 12),
        heads=heads,
        head_dim=h // heads,
        kv_width=h,
        ffn=whole(config, ("n_inner",), 4 * h),
        vocabulary=whole(config, ("vocab_size",), 50257),
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout=max(share(config, key, 0.1) for key in GPT2_DROPOUTS),
        positions=whole(config, ("n_positions", "max_position_embeddings"), 1024),
        classes=classes,
    )


def _decoder(architecture: str, config: dict[str, Any], classes: int | None) -> ModelShape | str:
    """The shape of a decoder of the table in `structures.py`."""
    family = DECODERS[architecture]
    if family.pooling != "last" and classes is None:
        return f"no closed form for {architecture} as a language model"
    values = _values(family, config)
    width = dict.fromkeys(family.as_wide, values["hidden_size"])
    if found := differing(config, {**family.needs, **width}):
        return f"no closed form for {architecture} with {found}"
    shape = _alike(architecture, family, values, classes)
    if family.is_latent:
        return _with_latent(shape, values)
    if family.is_first_bare:
        bare = replace(shape, structure=replace(family.structure, order="pre_feed_forward"))
        shape = replace(shape, segments=((bare, 1), (shape, shape.layers - 1)))
    return _with_experts(shape, values) if "num_local_experts" in family.defaults else shape


def _values(family: Decoder, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the family's defaults, by the common names of the keys."""
    stated = {k: v for k, v in config.items() if v is not None or k in _NULL_IS_A_VALUE}
    values = {**family.defaults, **stated}
    for common, own in family.names.items():
        values[common] = values.get(own, values.get(common))
    return values


def _alike(
    architecture: str, family: Decoder, values: dict[str, Any], classes: int | None
) -> ModelShape:
    """The shape of a decoder whose layers are all alike and have no experts."""
    h = whole(values, ("hidden_size",), None)
    heads = whole(values, ("num_attention_heads",), None)
    kv_heads = whole(values, ("num_key_value_heads",), heads)
    if heads % kv_heads:
        raise PlanError(
            f"model.config.num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    if values.get("head_dim") is None:
        refuse_remainder(h, heads)
    head_dim = whole(values, ("head_dim",), h // heads)
    layers = whole(values, ("num_hidden_layers",), None)
    qkv, out, feed_forward = (
        key if isinstance(key, bool) else bool(values.get(key, False)) for key in family.biases
    )
    positions = None
    if family.extra_positions:
        positions = whole(values, ("max_position_embeddings",), None) + family.extra_positions
    return ModelShape(
        family="decoder",
        architecture=architecture,
        hidden=h,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        kv_width=kv_heads * head_dim,
        ffn=whole(values, ("intermediate_size",), None),
        vocabulary=whole(values, ("vocab_size",), None),
        tied=bool(values.get("tie_word_embeddings", False)),
        dropout=max(share(values, key, 0.0) for key in family.dropouts),
        positions=positions,
        unused_positions=family.extra_positions,
        classes=classes,
        pooling=family.pooling,
        has_embedding_block=family.has_embedding_block,
        window=_window(family, values),
        has_qkv_bias=qkv,
        has_out_bias=out,
        has_mlp_bias=feed_forward,
        has_head_bias=family.has_head_bias,
        structure=family.structure,
        rotary_share=_rotary_share(values),
        windowed=_windowed(family, values, layers),
        rotated=_rotated(family, values, layers),
    )


def _window(family: Decoder, values: dict[str, Any]) -> int | None:
    """The sliding window in tokens; None without one, or where the config keeps it switched off."""
    return None if "use_sliding_window" in family.needs else values.get("sliding_window")


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
    keys = ("_sliding_window_pattern", "sliding_window_pattern", "global_attn_every_n_layers")
    return _all_but_every(values, keys, family.full_every, layers, family.full_from)


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
    values: dict[str, Any],
    keys: tuple[str, ...],
    default: int,
    layers: int,
    begin: int | None = None,
) -> tuple[bool, ...]:
    """False for every n-th layer, n the value of the first key that is set; empty for other families.

    `begin`: the first of those; None for the n-th layer.
    """
    if not default:
        return ()
    every = whole(values, keys, default)
    begin = every - 1 if begin is None else begin
    return tuple((number - begin) % every != 0 for number in range(layers))


def _with_latent(dense: ModelShape, values: dict[str, Any]) -> ModelShape | str:
    """DeepSeek's attention, and experts in all but the first layers."""
    if dense.kv_width != dense.query_width:
        return f"no closed form for {dense.architecture} with num_key_value_heads"
    if values.get("num_experts_per_tok") is None:
        return f"no closed form for {dense.architecture} without num_experts_per_tok"
    ranks = ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
    kv_rank, rotated, value_dim, plain = (whole(values, (key,), None) for key in ranks)
    query_rank = values.get("q_lora_rank")
    dense = replace(
        dense,
        head_dim=plain + rotated,
        kv_width=dense.heads * (plain + rotated),
        rotary_share=rotated / (plain + rotated),
        latent=Latent(query_rank, kv_rank, rotated, value_dim),
    )
    first = min(values["first_k_dense_replace"] or 0, dense.layers)
    mixture = _with_experts(dense, {"num_experts": values["n_routed_experts"], **values})
    shared = whole(values, ("n_shared_experts",), None) * mixture.ffn
    mixture = replace(mixture, shared_experts=shared)
    if first in (0, dense.layers):
        return dense if first else mixture
    return replace(mixture, segments=((dense, first), (mixture, dense.layers - first)))


def _with_experts(dense: ModelShape, values: dict[str, Any]) -> ModelShape:
    experts = whole(values, ("num_experts", "num_local_experts"), None)
    top_k = whole(values, ("num_experts_per_tok",), None)
    if top_k > experts:
        raise PlanError(
            f"model.config.num_experts_per_tok: {top_k} > {experts} experts. Nearest: {experts}"
        )
    ffn = whole(values, ("moe_intermediate_size",), dense.ffn)
    return replace(dense, ffn=ffn, experts=experts, top_k=top_k)


LANGUAGE_MODELS: dict[str, Reading] = {
    "gpt2": Reading(_GPT2_KEYS, "activation_function", "gelu_new", _gpt2),
    **{
        name: Reading((*_DECODER_KEYS, *family.defaults, *family.dropouts, *family.needs,
                       family.activation_key),
                      family.activation_key, family.activation, _decoder)
        for name, family in DECODERS.items()
    },
}  # fmt: skip
"""By architecture, the `model_type` of transformers."""
