"""The shape of a known dense decoder from its transformers config: widths and parameter counts.

Defaults are those of the config classes of transformers 5; a test holds every count against the
real model built on the meta device.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from toolkit.errors import PlanError

GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder; counts are numbers of parameters, not bytes.

    `positions` is how many positions the model learns, None where they are computed.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_width: int
    ffn: int
    vocabulary: int
    positions: int | None
    tied: bool
    dropout: float
    layer_parameters: int
    linear_per_layer: int
    embedding_parameters: int
    parameters: int

    def flops_per_sample(self, sequence_length: int) -> int:
        """FLOPs of forward and backward of one row.

        Per token 6 × matrix weights + 12 × layers × hidden × sequence (Chowdhery et al. 2022,
        PaLM, appendix B).
        """
        matrices = self.layers * self.linear_per_layer + self.vocabulary * self.hidden
        attention = 12 * self.layers * self.hidden * sequence_length
        return (6 * matrices + attention) * sequence_length


_LLAMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}


def find_shape(architecture: str, config: dict[str, Any]) -> ModelShape | None:
    """The shape of a known architecture; None for any other (its memory is then unknown).

    PlanError for a width that is not a positive whole number, or a key that is nearly a known one.
    """
    if architecture == "gpt2":
        refuse_near_misses(config, _GPT2_KEYS)
        return _gpt2(config)
    if architecture in _LLAMA_DEFAULTS:
        refuse_near_misses(config, _LLAMA_KEYS)
        return _llama(architecture, config)
    return None


_COMMON_KEYS = ("vocab_size", "tie_word_embeddings", "hidden_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")  # fmt: skip
_GPT2_KEYS = (
    *_COMMON_KEYS,
    *GPT2_DROPOUTS,
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "n_inner",
)
_LLAMA_KEYS = (*_COMMON_KEYS, "intermediate_size", "num_key_value_heads", "head_dim",
               "attention_bias", "mlp_bias", "attention_dropout")  # fmt: skip


def refuse_near_misses(config: dict[str, Any], known: Collection[str]) -> None:
    """Transformers ignores unknown keys; one that is nearly a known one is a slip."""
    for key in config:
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(key, known, n=1, cutoff=0.88)
            if close:
                raise PlanError(f"model.config.{key}: unknown key. Did you mean {close[0]!r}?")


def _whole(config: dict[str, Any], keys: tuple[str, ...], default: int | None) -> int:
    """The first key that is set, a positive whole number, or the default."""
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


def _gpt2(config: dict[str, Any]) -> ModelShape:
    h = _whole(config, ("n_embd", "hidden_size"), 768)
    layers = _whole(config, ("n_layer", "num_hidden_layers"), 12)
    heads = _whole(config, ("n_head", "num_attention_heads"), 12)
    positions = _whole(config, ("n_positions", "max_position_embeddings"), 1024)
    ffn = _whole(config, ("n_inner",), 4 * h)
    vocabulary = _whole(config, ("vocab_size",), 50257)
    _refuse_remainder(h, heads)
    tied = bool(config.get("tie_word_embeddings", True))
    linear = 4 * h * h + 2 * h * ffn
    per_layer = linear + 9 * h + ffn  # biases 3h + h + ffn + h, two layer norms of 2h
    embedding = vocabulary * h
    total = embedding * (1 if tied else 2) + positions * h + layers * per_layer + 2 * h
    dropout = max(_share(config, key, 0.1) for key in GPT2_DROPOUTS)
    return ModelShape(
        "gpt2", h, layers, heads, h, ffn, vocabulary, positions, tied, dropout,
        per_layer, linear, embedding, total,
    )  # fmt: skip


def _refuse_remainder(hidden: int, heads: int) -> None:
    if hidden % heads:
        raise PlanError(
            f"model.config: {hidden} hidden / {heads} heads = {hidden / heads:.2f}, not a whole "
            f"number. Nearest: {hidden // heads * heads or heads} or {(hidden // heads + 1) * heads}"
        )


def _llama(architecture: str, config: dict[str, Any]) -> ModelShape:
    defaults = _LLAMA_DEFAULTS[architecture]
    h = _whole(config, ("hidden_size",), 4096)
    layers = _whole(config, ("num_hidden_layers",), 32)
    heads = _whole(config, ("num_attention_heads",), 32)
    kv_heads = _whole(config, ("num_key_value_heads",), defaults["num_key_value_heads"] or heads)
    if "head_dim" not in defaults and config.get("head_dim") is None:
        _refuse_remainder(h, heads)
    head_dim = _whole(config, ("head_dim",), defaults.get("head_dim") or h // heads)
    ffn = _whole(config, ("intermediate_size",), defaults["intermediate_size"])
    vocabulary = _whole(config, ("vocab_size",), defaults["vocab_size"])
    q, kv = heads * head_dim, kv_heads * head_dim
    tied = bool(config.get("tie_word_embeddings", False))
    linear = 2 * h * q + 2 * h * kv + 3 * h * ffn
    extra = 2 * h
    if architecture == "qwen2":
        extra += q + 2 * kv
    elif architecture == "qwen3":
        extra += 2 * head_dim
    if config.get("attention_bias") and architecture != "qwen2":
        extra += q + 2 * kv + h
    if config.get("mlp_bias"):
        extra += 2 * ffn + h
    embedding = vocabulary * h
    total = embedding * (1 if tied else 2) + layers * (linear + extra) + h
    return ModelShape(
        "llama", h, layers, heads, kv, ffn, vocabulary, None, tied,
        _share(config, "attention_dropout", 0.0), linear + extra, linear, embedding, total,
    )  # fmt: skip
