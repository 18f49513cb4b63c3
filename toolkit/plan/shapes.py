"""The shape of a known dense decoder from its transformers config: widths and parameter counts.

Defaults are those of the config classes of transformers 5; a test holds every count against the
real model built on the meta device.
"""

from dataclasses import dataclass
from typing import Any

GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder; counts are numbers of parameters, not bytes."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_width: int
    ffn: int
    vocabulary: int
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
    """The shape of a known architecture; None for any other (its memory is then unknown)."""
    if architecture == "gpt2":
        return _gpt2(config)
    if architecture in _LLAMA_DEFAULTS:
        return _llama(architecture, config)
    return None


def _gpt2(config: dict[str, Any]) -> ModelShape:
    h = int(config.get("n_embd", config.get("hidden_size", 768)))
    layers = int(config.get("n_layer", config.get("num_hidden_layers", 12)))
    heads = int(config.get("n_head", config.get("num_attention_heads", 12)))
    positions = int(config.get("n_positions", config.get("max_position_embeddings", 1024)))
    ffn = int(config.get("n_inner") or 4 * h)
    vocabulary = int(config.get("vocab_size", 50257))
    tied = bool(config.get("tie_word_embeddings", True))
    linear = 4 * h * h + 2 * h * ffn
    per_layer = linear + 9 * h + ffn  # biases 3h + h + ffn + h, two layer norms of 2h
    embedding = vocabulary * h
    total = embedding * (1 if tied else 2) + positions * h + layers * per_layer + 2 * h
    dropout = max(float(config.get(key, 0.1)) for key in GPT2_DROPOUTS)
    return ModelShape(
        "gpt2", h, layers, heads, h, ffn, vocabulary, tied, dropout,
        per_layer, linear, embedding, total,
    )  # fmt: skip


def _llama(architecture: str, config: dict[str, Any]) -> ModelShape:
    values = {**_LLAMA_DEFAULTS[architecture], **config}
    h = int(values.get("hidden_size", 4096))
    layers = int(values.get("num_hidden_layers", 32))
    heads = int(values.get("num_attention_heads", 32))
    kv_heads = int(values["num_key_value_heads"] or heads)
    head_dim = int(values.get("head_dim") or h // heads)
    q, kv, ffn = heads * head_dim, kv_heads * head_dim, int(values["intermediate_size"])
    vocabulary = int(values["vocab_size"])
    tied = bool(values.get("tie_word_embeddings", False))
    linear = 2 * h * q + 2 * h * kv + 3 * h * ffn
    extra = 2 * h
    if architecture == "qwen2":
        extra += q + 2 * kv
    elif architecture == "qwen3":
        extra += 2 * head_dim
    if values.get("attention_bias") and architecture != "qwen2":
        extra += q + 2 * kv + h
    if values.get("mlp_bias"):
        extra += 2 * ffn + h
    embedding = vocabulary * h
    total = embedding * (1 if tied else 2) + layers * (linear + extra) + h
    return ModelShape(
        "llama", h, layers, heads, kv, ffn, vocabulary, tied,
        float(values.get("attention_dropout", 0.0)),
        linear + extra, linear, embedding, total,
    )  # fmt: skip
