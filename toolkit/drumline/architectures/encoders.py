"""Reads the shapes of encoders, of texts and of images, from their configs. Pure."""

from dataclasses import replace
from typing import Any

from drumline.architectures.fields import Reading, differing, refuse_remainder, share, sides, whole
from drumline.architectures.shapes import ModelShape, RelativePositions
from drumline.architectures.structures import Pooling, Structure

BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

_COMMON_KEYS = (*BERT_DROPOUTS, "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels",
                "intermediate_size", "hidden_act")  # fmt: skip
_TEXT_KEYS = (*_COMMON_KEYS, "vocab_size", "max_position_embeddings", "type_vocab_size",
              "tie_word_embeddings")  # fmt: skip
_IMAGE_KEYS = (*_COMMON_KEYS, "image_size", "patch_size", "num_channels", "qkv_bias")
_ROBERTA_VOCABULARIES = {"roberta": 50265, "xlm-roberta": 30522, "camembert": 30522}
"""Default vocabularies of BERT's relatives. Their positions begin after that of the padding token."""
_DISTILBERT_NAMES = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
                     "num_attention_heads": "n_heads", "hidden_dropout_prob": "dropout",
                     "attention_probs_dropout_prob": "attention_dropout"}  # fmt: skip
"""DistilBERT's own names of what BERT's config has."""
_T5_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128,
           "feed_forward_proj": "relu"},
    "mt5": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112,
            "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
_T5_ACTIVATIONS = {"gated-gelu": "gelu_new", "gated-silu": "silu", "gated-relu": "relu"}
_DEBERTA_NEEDS = {"conv_kernel_size": 0, "pooler_dropout": 0.0, "pooler_hidden_act": "gelu"}
_DINOV2_NEEDS = {"use_swiglu_ffn": False, "drop_path_rate": 0.0}
_SIGLIP_NEEDS = {"attention_dropout": 0.0}


def _encoder(family: str, architecture: str, config: dict[str, Any], classes: int, pooling: Pooling,
             dropout: float, defaults: tuple[int, int, int, int] = (768, 12, 12, 3072),
             **its_own: Any) -> ModelShape:  # fmt: skip
    """A shape from the keys that all encoders share.

    `dropout` and `defaults` are those of its config class; the latter of hidden_size, num_hidden_layers,
    num_attention_heads and intermediate_size.
    """
    h = whole(config, ("hidden_size",), defaults[0])
    heads = whole(config, ("num_attention_heads",), defaults[2])
    refuse_remainder(h, heads)
    return ModelShape(
        family=family,
        architecture=architecture,
        hidden=h,
        layers=whole(config, ("num_hidden_layers",), defaults[1]),
        heads=heads,
        head_dim=h // heads,
        kv_width=h,
        ffn=whole(config, ("intermediate_size",), defaults[3]),
        tied=True,
        dropout=max(share(config, key, dropout) for key in BERT_DROPOUTS),
        classes=classes,
        pooling=pooling,
        **its_own,
    )


def _bert(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    is_roberta = architecture in _ROBERTA_VOCABULARIES
    return _encoder(
        "bert",
        architecture,
        config,
        classes,
        "first_tanh",
        dropout=0.1,
        vocabulary=whole(config, ("vocab_size",), _ROBERTA_VOCABULARIES.get(architecture, 30522)),
        positions=whole(config, ("max_position_embeddings",), 512),
        unused_positions=(config.get("pad_token_id", 1) or 0) + 1 if is_roberta else 0,
        types=whole(config, ("type_vocab_size",), 2),
        has_embedding_block=True,
        has_qkv_bias=True,
    )


def _distilbert(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    if config.get("sinusoidal_pos_embds"):
        return f"no closed form for {architecture} with sinusoidal_pos_embds"
    common = {name: config[own] for name, own in _DISTILBERT_NAMES.items() if own in config}
    return _encoder(
        "bert",
        architecture,
        common,
        classes,
        "first_tanh",
        dropout=0.1,
        defaults=(768, 6, 12, 3072),
        vocabulary=whole(config, ("vocab_size",), 30522),
        positions=whole(config, ("max_position_embeddings",), 512),
        has_qkv_bias=True,
        drops_attention=False,
    )


def _deberta(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    h = whole(config, ("hidden_size",), 1536)
    found = differing(config, {**_DEBERTA_NEEDS, "embedding_size": h, "pooler_hidden_size": h})
    if found:
        return f"no closed form for {architecture} with {found}"
    positions = whole(config, ("max_position_embeddings",), 512)
    kinds = config.get("pos_att_type") or []
    if isinstance(kinds, str):
        kinds = [kind.strip() for kind in kinds.lower().split("|")]
    relative = None
    if config.get("relative_attention"):
        farthest = config.get("max_relative_positions", -1)
        buckets = config.get("position_buckets", -1)
        relative = RelativePositions(
            span=buckets if buckets > 0 else farthest if farthest > 0 else positions,
            kinds=tuple(kinds),
            shares_keys=bool(config.get("share_att_key")),
            is_normed="layer_norm" in config.get("norm_rel_ebd", "none").lower(),
        )
    return _encoder(
        "deberta",
        architecture,
        config,
        classes,
        "first_gelu",
        dropout=0.1,
        defaults=(1536, 24, 24, 6144),
        vocabulary=whole(config, ("vocab_size",), 128100),
        positions=positions if config.get("position_biased_input", True) else None,
        types=config.get("type_vocab_size", 0),
        has_qkv_bias=True,
        relative=relative,
    )


def _t5(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    config = {**_T5_DEFAULTS[architecture], **config}
    heads, head_dim = (whole(config, (key,), None) for key in ("num_heads", "d_kv"))
    encoder = whole(config, ("num_layers",), None)
    is_gated = config["feed_forward_proj"].startswith("gated")
    decoder = whole(config, ("num_decoder_layers",), encoder)
    shape = ModelShape(
        family="t5",
        architecture=architecture,
        hidden=whole(config, ("d_model",), None),
        layers=encoder + decoder,
        heads=heads,
        head_dim=head_dim,
        kv_width=heads * head_dim,
        ffn=whole(config, ("d_ff",), None),
        vocabulary=whole(config, ("vocab_size",), None),
        tied=True,
        dropout=share(config, "dropout_rate", 0.1),
        classes=classes,
        pooling="first_tanh",
        structure=Structure(feed_forward="gated" if is_gated else "plain", rotary="none"),
    )
    crossing = replace(shape, crosses=True)
    buckets = whole(config, ("relative_attention_num_buckets",), 32)
    segments = [
        (replace(shape, buckets=buckets), 1), (shape, encoder - 1),
        (replace(crossing, buckets=buckets), 1), (crossing, decoder - 1),
    ]  # fmt: skip
    return replace(shape, segments=tuple((one, number) for one, number in segments if number))


def _image(family: str, architecture: str, config: dict[str, Any], classes: int, pooling: Pooling,
           patch_side: int, **its_own: Any) -> ModelShape:  # fmt: skip
    """The shape of a transformer on patches of an image."""
    height, width = sides(config, "image_size", 224)
    tall, wide = sides(config, "patch_size", patch_side)
    return _encoder(
        family,
        architecture,
        config,
        classes,
        pooling,
        dropout=0.0,
        vocabulary=0,
        patches=(height // tall) * (width // wide),
        patch_inputs=tall * wide * whole(config, ("num_channels",), 3),
        has_embedding_block=True,
        has_qkv_bias=bool(config.get("qkv_bias", True)),
        **its_own,
    )


def _vit(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    return _image("vit", architecture, config, classes, "first", patch_side=16)


def _dinov2(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    if found := differing(config, _DINOV2_NEEDS):
        return f"no closed form for {architecture} with {found}"
    h = whole(config, ("hidden_size",), 768)
    ffn = int(h * config.get("mlp_ratio", 4))
    return _image("vit", architecture, {**config, "intermediate_size": ffn}, classes, "first_and_mean",
                  patch_side=14, has_layer_scale=True,
                  has_mask_token=bool(config.get("use_mask_token", True)))  # fmt: skip


def _siglip(architecture: str, config: dict[str, Any], classes: int) -> ModelShape | str:
    if found := differing(config, _SIGLIP_NEEDS):
        return f"no closed form for {architecture} with {found}"
    return _image("vit", architecture, config, classes, "mean", patch_side=16, has_class_token=False,
                  has_unused_pooler=bool(config.get("vision_use_head", True)))  # fmt: skip


ENCODERS: dict[str, Reading] = {
    **dict.fromkeys(("bert", *_ROBERTA_VOCABULARIES), Reading(_TEXT_KEYS, "hidden_act", "gelu", _bert)),
    "distilbert": Reading((*_DISTILBERT_NAMES.values(), "vocab_size", "max_position_embeddings",
                           "activation", "sinusoidal_pos_embds"), "activation", "gelu", _distilbert),
    "deberta-v2": Reading((*_TEXT_KEYS, *_DEBERTA_NEEDS, "relative_attention", "pos_att_type",
                           "position_buckets", "max_relative_positions", "share_att_key", "norm_rel_ebd",
                           "position_biased_input"), "hidden_act", "gelu", _deberta),
    **{
        name: Reading((*defaults, "num_decoder_layers", "relative_attention_num_buckets", "dropout_rate",
                       "relative_attention_max_distance", "tie_word_embeddings"), "feed_forward_proj",
                      defaults["feed_forward_proj"], _t5, activations=_T5_ACTIVATIONS)
        for name, defaults in _T5_DEFAULTS.items()
    },
    "vit": Reading(_IMAGE_KEYS, "hidden_act", "gelu", _vit),
    "dinov2": Reading((*_IMAGE_KEYS, *_DINOV2_NEEDS, "mlp_ratio", "use_mask_token", "layerscale_value"),
                      "hidden_act", "gelu", _dinov2),
    "siglip": Reading((*_IMAGE_KEYS, *_SIGLIP_NEEDS, "vision_use_head"), "hidden_act",
                      "gelu_pytorch_tanh", _siglip, nested="vision_config"),
}  # fmt: skip
"""Classifiers, by architecture."""
