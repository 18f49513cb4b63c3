"""How the layers of each decoder family are put together, and the defaults of its config: one row a family.

The order of the operations is that of transformers 5; `memory/families.py` follows it. A row is compared with
the real model: its parameters by `tests/plan/test_shapes.py`, its memory by `tests/memory/test_trace.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Pooling = Literal[
    "last",
    "first",
    "mean",
    "first_and_mean",
    "first_tanh",
    "first_gelu",
    "first_norm",
    "tokens",
    "vocabulary",
]
"""What a classifier's head reads. last: every token, of which the last one counts. first, mean: that token,
or the mean of all patches, or both side by side; first_tanh, first_gelu, first_norm: the first token after
another layer with this activation, and with a norm. tokens: every token has a class. vocabulary: every token
is guessed, after another layer with a norm."""

Norm = Literal["rms", "rms_wide", "layer", "layer_without_shift", "cohere"]
"""rms: x / rms cast back, then times the weight. rms_wide: times the weight in fp32, then cast back. layer:
torch's LayerNorm with a shift, or without one. cohere: a LayerNorm of single operations in fp32, without a
shift."""

Order = Literal["pre", "pre_feed_forward", "post", "sandwich", "parallel", "parallel_two_norms"]
"""Where a layer's norms are: before attention and feed-forward, before the latter only, after both, or
before and after; parallel: both parts read the same input, through one norm or through one each."""

FeedForward = Literal["gated", "gated_packed", "plain"]
"""gated: down(act(gate(x)) · up(x)), packed: gate and up in one product. plain: down(act(up(x)))."""

Rotary = Literal["full", "full_wide", "joined", "wide", "complex", "pairs", "none"]
"""Rotary positions: of all features of a head, in fp32 or not; of a part, joined with the rest; in fp32, on
pairs of neighbours; of latent attention, as complex numbers or as pairs; none, for learned positions."""


@dataclass(frozen=True)
class Structure:
    """The structure of a decoder's layers and of what surrounds them.

    `packs_qkv`: q, k and v come out of one product, and how they are taken from it. `qk_norm`: queries and
    keys are normalised, per head or over their full width. `embedding_scale`: the embedding is multiplied
    by a tensor or by a number. `scales_residual`: what is added to the residual stream is multiplied first.
    `scales_query`: so is the query before attention. `caps_scores`: attention scores go through a tanh.
    `has_local_rotary`: layers with a window have rotary tables of their own. `has_embedding_norm`: the
    embedding is normalised. `logit_operations`: elementwise operations on the logits; of these a tanh is
    saved for the backward.
    """

    norm: Norm = "rms"
    order: Order = "pre"
    feed_forward: FeedForward = "gated"
    rotary: Rotary = "full"
    packs_qkv: Literal["slices", "chunks"] | None = None
    qk_norm: Literal["head", "full"] | None = None
    embedding_scale: Literal["tensor", "number"] | None = None
    scales_residual: bool = False
    scales_query: bool = False
    caps_scores: bool = False
    has_local_rotary: bool = False
    has_embedding_norm: bool = False
    logit_operations: tuple[Literal["scale", "tanh"], ...] = ()

    @property
    def norms(self) -> int:
        """Norms of a layer, without those of queries and keys."""
        return {"pre": 2, "pre_feed_forward": 1, "post": 2, "sandwich": 4, "parallel": 1,
                "parallel_two_norms": 2}[self.order]  # fmt: skip

    @property
    def has_shift(self) -> bool:
        """Whether a norm has a bias."""
        return self.norm == "layer"


LLAMA = Structure()
"""The structure of Llama, and of those families that differ in sizes and biases only."""


@dataclass(frozen=True)
class Decoder:
    """A decoder family: its structure, and how its config is read.

    `defaults`: those of its config class, by the common names of the keys. `names`: its own names of them.
    `biases`: (of q, k and v; of the output projection; of the feed-forward), each a key of the config, or
    whether there is one. `dropouts`: keys of its dropout probabilities. `needs`: values of the config that
    the closed form assumes; a number with a point stands for any but 0. `as_wide`: keys that must equal the
    hidden width. `full_every`: every how many layers one attends to all tokens (0: none does).
    `rotary_every`: every how many layers one has no rotary positions. `full_from`: the first of those.
    `extra_positions`: learned positions that no token takes. `pooling`: of an encoder, which is a classifier.
    `is_first_bare`: the first layer has no norm before attention. `is_latent`: it has DeepSeek's attention.
    `has_embedding_block`: FSDP2 shards the embeddings by themselves.
    """

    structure: Structure = LLAMA
    defaults: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    biases: tuple[str | bool, str | bool, str | bool] = (False, False, False)
    dropouts: tuple[str, ...] = ("attention_dropout",)
    needs: dict[str, Any] = field(default_factory=dict)
    as_wide: tuple[str, ...] = ()
    full_every: int = 0
    rotary_every: int = 0
    has_head_bias: bool = False
    extra_positions: int = 0
    activation: str = "silu"
    activation_key: str = "hidden_act"
    full_from: int | None = None
    pooling: Pooling = "last"
    is_first_bare: bool = False
    is_latent: bool = False
    has_embedding_block: bool = False


def _sizes(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None,
           **others: Any) -> dict[str, Any]:  # fmt: skip
    return {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            **others}  # fmt: skip


_NO_SLIDING = {"use_sliding_window": False}
_GEMMA = Structure(norm="rms_wide", embedding_scale="tensor")
_GEMMA_2 = Structure(norm="rms_wide", order="sandwich", embedding_scale="tensor", caps_scores=True,
                     logit_operations=("scale", "tanh", "scale"))  # fmt: skip
_GEMMA_3 = Structure(
    norm="rms_wide",
    order="sandwich",
    embedding_scale="tensor",
    qk_norm="head",
    has_local_rotary=True,
)
_MODERNBERT = Structure(norm="layer_without_shift", feed_forward="gated_packed", rotary="full_wide",
                        packs_qkv="chunks", has_local_rotary=True, has_embedding_norm=True)  # fmt: skip
_PARTIAL = Structure(norm="layer", order="parallel", feed_forward="plain", rotary="joined")

_LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
           "v_head_dim": 128}  # fmt: skip

DECODERS: dict[str, Decoder] = {
    "llama": Decoder(defaults=_sizes(32000, 4096, 11008, 32, 32),
                     biases=("attention_bias", "attention_bias", "mlp_bias")),
    "mistral": Decoder(defaults=_sizes(32000, 4096, 14336, 32, 32, 8, sliding_window=4096)),
    "mixtral": Decoder(defaults=_sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8,
                                       num_experts_per_tok=2)),
    "qwen2": Decoder(defaults=_sizes(151936, 4096, 22016, 32, 32, 32), biases=(True, False, False),
                     needs=_NO_SLIDING),
    "qwen3": Decoder(Structure(qk_norm="head"), _sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128),
                     biases=("attention_bias", "attention_bias", False), needs=_NO_SLIDING),
    "qwen3_moe": Decoder(Structure(qk_norm="head"),
                         _sizes(151936, 2048, 6144, 24, 32, 4, num_local_experts=128,
                                num_experts_per_tok=8, moe_intermediate_size=768),
                         biases=("attention_bias", "attention_bias", False),
                         needs=_NO_SLIDING | {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    "deepseek_v2": Decoder(Structure(rotary="complex"),
                           _sizes(102400, 4096, 11008, 32, 32, n_routed_experts=64, n_shared_experts=2,
                                  moe_intermediate_size=1407, first_k_dense_replace=0, **_LATENT),
                           needs={"attention_bias": False, "mlp_bias": False}, is_latent=True),
    "deepseek_v3": Decoder(Structure(rotary="pairs"),
                           _sizes(129280, 7168, 18432, 61, 128, 128, n_routed_experts=256, n_shared_experts=1,
                                  num_experts_per_tok=8, moe_intermediate_size=2048,
                                  first_k_dense_replace=3, **_LATENT),
                           needs={"attention_bias": False, "rope_interleave": True}, is_latent=True),
    "granite": Decoder(Structure(embedding_scale="number", scales_residual=True, logit_operations=("scale",)),
                       _sizes(32000, 4096, 11008, 32, 32),
                       biases=("attention_bias", "attention_bias", "mlp_bias")),
    "smollm3": Decoder(defaults=_sizes(128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True),
                       biases=("attention_bias", "attention_bias", "mlp_bias"), needs=_NO_SLIDING,
                       rotary_every=4),
    "olmo2": Decoder(Structure(norm="rms_wide", order="post", qk_norm="full"),
                     _sizes(50304, 4096, 11008, 32, 32),
                     biases=("attention_bias", "attention_bias", False)),
    "gemma": Decoder(_GEMMA, _sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256, tie_word_embeddings=True),
                     biases=("attention_bias", "attention_bias", False), activation="gelu_pytorch_tanh"),
    "gemma2": Decoder(_GEMMA_2, _sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256, sliding_window=4096,
                                       tie_word_embeddings=True),
                      biases=("attention_bias", "attention_bias", False), full_every=2,
                      activation="gelu_pytorch_tanh", activation_key="hidden_activation",
                      needs={"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    "gemma3_text": Decoder(_GEMMA_3, _sizes(262208, 2304, 9216, 26, 8, 4, head_dim=256,
                                            sliding_window=4096, tie_word_embeddings=True),
                           biases=("attention_bias", "attention_bias", False), full_every=6,
                           activation="gelu_pytorch_tanh", activation_key="hidden_activation",
                           needs={"use_bidirectional_attention": False, "final_logit_softcapping": None,
                                  "attn_logit_softcapping": None}),
    "cohere": Decoder(Structure(norm="cohere", order="parallel", rotary="wide", logit_operations=("scale",)),
                      _sizes(256000, 8192, 22528, 40, 64, tie_word_embeddings=True),
                      biases=("attention_bias", "attention_bias", False), needs={"use_qk_norm": False}),
    "phi": Decoder(_PARTIAL, _sizes(51200, 2048, 8192, 24, 32, 32, partial_rotary_factor=0.5),
                   biases=(True, True, True),
                   dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"), has_head_bias=True,
                   activation="gelu_new", needs={"qk_layernorm": False}),
    "phi3": Decoder(Structure(feed_forward="gated_packed", rotary="joined", packs_qkv="slices"),
                    _sizes(32064, 3072, 8192, 32, 32, 32),
                    dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop")),
    "gpt_neox": Decoder(Structure(norm="layer", order="parallel_two_norms", feed_forward="plain",
                                  rotary="joined", packs_qkv="chunks"),
                        _sizes(50432, 6144, 24576, 44, 64, attention_bias=True,
                               partial_rotary_factor=0.25), biases=("attention_bias", "attention_bias", True),
                        dropouts=("attention_dropout", "hidden_dropout"), activation="gelu",
                        needs={"use_parallel_residual": True}),
    "starcoder2": Decoder(Structure(norm="layer", feed_forward="plain"),
                          _sizes(49152, 3072, 12288, 30, 24, 2, tie_word_embeddings=True, use_bias=True),
                          biases=("use_bias", "use_bias", "use_bias"),
                          dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
                          activation="gelu_pytorch_tanh"),
    "opt": Decoder(Structure(norm="layer", feed_forward="plain", rotary="none", scales_query=True),
                   _sizes(50272, 768, 3072, 12, 12, tie_word_embeddings=True, max_position_embeddings=2048,
                          dropout=0.1, enable_bias=True),
                   names={"intermediate_size": "ffn_dim"},
                   biases=("enable_bias", "enable_bias", "enable_bias"),
                   dropouts=("attention_dropout", "dropout"), extra_positions=2, activation="relu",
                   as_wide=("word_embed_proj_dim",),
                   activation_key="activation_function",
                   needs={"do_layer_norm_before": True, "_remove_final_layer_norm": False,
                          "layer_norm_elementwise_affine": True, "layerdrop": 0.0}),
    "modernbert": Decoder(_MODERNBERT, _sizes(50368, 768, 1152, 22, 12, sliding_window=128,
                                                           tie_word_embeddings=True),
                          biases=("attention_bias", "attention_bias", "mlp_bias"),
                          dropouts=("attention_dropout", "embedding_dropout", "mlp_dropout",
                                    "classifier_dropout"),
                          names={"sliding_window": "local_attention"},
                          full_every=3, full_from=0, activation="gelu",
                          activation_key="hidden_activation", pooling="first_norm", is_first_bare=True,
                          has_embedding_block=True,
                          needs={"norm_bias": False, "classifier_bias": False, "classifier_pooling": "cls",
                                 "classifier_activation": "gelu"}),
}  # fmt: skip
"""By architecture, the `model_type` of transformers."""
