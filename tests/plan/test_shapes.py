"""Parameter counts without torch, held against the real models of transformers."""

import dataclasses
from typing import Any

import pytest

from drumline.architectures.configs import read_shape
from drumline.architectures.decoders import LANGUAGE_MODELS
from drumline.architectures.encoders import ENCODERS
from drumline.architectures.shapes import ModelShape
from drumline.errors import PlanError
from drumline.train.models import named_blocks

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": "c2p|p2c",
    "position_buckets": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 8,
    "vocab_size": 99,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    (
        "gpt2",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 32,
            "vocab_size": 99,
            "n_inner": 100,
        },
    ),
    ("llama", {}),
    ("llama", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 99}),
    ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("mistral", {**SMALL, "num_key_value_heads": 2}),
    ("qwen2", {**SMALL, "num_key_value_heads": 4}),
    ("qwen3", {**SMALL, "num_key_value_heads": 2}),
    ("smollm3", {**SMALL, "num_key_value_heads": None}),
    ("qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}),
    ("mixtral", {**SMALL, "num_local_experts": 4}),
    ("qwen3_moe", {**SMALL, "num_experts": 8, "moe_intermediate_size": 40, "vocab_size": 99}),
    *((name, {}) for name in ("granite", "smollm3", "olmo2", "gemma", "gemma2", "gemma3_text", "cohere", "phi",
                              "phi3", "gpt_neox", "starcoder2", "opt")),
    *((name, {**SMALL, "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 1}) for name in ("granite", "smollm3", "olmo2", "cohere", "phi", "phi3", "starcoder2")),
    *((name, {**SMALL, "num_key_value_heads": 2, "head_dim": 16}) for name in ("gemma", "gemma2", "gemma3_text")),
    ("deepseek_v2", DEEPSEEK),
    ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": 24, "first_k_dense_replace": 0}),
    ("deepseek_v3", {**DEEPSEEK, "n_group": 2, "topk_group": 1}),
    ("granite", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", {**SMALL, "tie_word_embeddings": False, "attention_bias": True}),
    ("gpt_neox", {**SMALL, "attention_bias": False}),
    ("starcoder2", {**SMALL, "use_bias": False}),
    ("opt", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 99,
             "max_position_embeddings": 50, "enable_bias": False, "word_embed_proj_dim": 64}),
]  # fmt: skip


def count_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_counts_are_those_of_the_real_model(architecture: str, config: dict[str, Any]) -> None:
    """All parameters, and those of one layer, equal the model built on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        full = transformers.AutoConfig.for_model(architecture, **config)
        model = transformers.AutoModelForCausalLM.from_config(full)
    shape = read_shape(architecture, config)
    assert isinstance(shape, ModelShape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = named_blocks(model)
    assert shape.layers == len(layers)
    assert shape.layer_shapes[0][0].layer_parameters == count_parameters(layers[0][1])
    assert shape.layer_shapes[-1][0].layer_parameters == count_parameters(layers[-1][1])
    assert (shape.hidden, shape.vocabulary) == (full.hidden_size, full.vocab_size)


@pytest.mark.parametrize(
    ("architecture", "config", "kind"),
    [
        ("bert", {}, "SequenceClassification"),
        ("bert", {**SMALL, "type_vocab_size": 3}, "SequenceClassification"),
        ("roberta", {}, "SequenceClassification"),
        ("roberta", {**SMALL, "vocab_size": 99, "type_vocab_size": 1}, "SequenceClassification"),
        ("xlm-roberta", {}, "SequenceClassification"),
        ("camembert", {}, "SequenceClassification"),
        ("distilbert", {}, "SequenceClassification"),
        (
            "distilbert",
            {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 80},
            "SequenceClassification",
        ),
        ("bert", {**SMALL, "vocab_size": 99}, "SequenceClassification"),
        ("modernbert", {}, "SequenceClassification"),
        (
            "modernbert",
            {**SMALL, "attention_bias": True, "mlp_bias": True},
            "SequenceClassification",
        ),
        ("deberta-v2", {}, "SequenceClassification"),
        ("deberta-v2", DEBERTA, "SequenceClassification"),
        (
            "deberta-v2",
            {**DEBERTA, "share_att_key": False, "pos_att_type": ["p2c"]},
            "SequenceClassification",
        ),
        (
            "deberta-v2",
            {**DEBERTA, "position_buckets": -1, "max_relative_positions": 40},
            "SequenceClassification",
        ),
        (
            "deberta-v2",
            {
                **DEBERTA,
                "norm_rel_ebd": "none",
                "position_biased_input": True,
                "type_vocab_size": 2,
            },
            "SequenceClassification",
        ),
        ("t5", {}, "SequenceClassification"),
        (
            "t5",
            {
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 2,
                "num_decoder_layers": 1,
                "num_heads": 3,
                "feed_forward_proj": "gated-gelu",
                "vocab_size": 99,
            },
            "SequenceClassification",
        ),
        ("mt5", {}, "SequenceClassification"),
        ("dinov2", {}, "ImageClassification"),
        (
            "dinov2",
            {
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 8,
                "mlp_ratio": 3,
                "use_mask_token": False,
                "image_size": [56, 28],
            },
            "ImageClassification",
        ),
        ("siglip", {}, "ImageClassification"),
        (
            "siglip",
            {
                "vision_config": {
                    **SMALL,
                    "vision_use_head": False,
                    "patch_size": 8,
                    "image_size": 64,
                }
            },
            "ImageClassification",
        ),
        ("vit", {}, "ImageClassification"),
        ("vit", {**SMALL, "image_size": 64, "qkv_bias": False}, "ImageClassification"),
        ("llama", {**SMALL, "vocab_size": 99}, "SequenceClassification"),
    ],
)
def test_counts_of_classifiers(architecture: str, config: dict[str, Any], kind: str) -> None:
    """All parameters equal those of the real classifier, its head with them."""
    import torch
    import transformers

    with torch.device("meta"):
        full = transformers.AutoConfig.for_model(architecture, num_labels=7, **config)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(full)
    shape = read_shape(architecture, config, classes=7)
    assert isinstance(shape, ModelShape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = [block for block in named_blocks(model) if "mbeddings" not in block[0]][: shape.layers]
    assert shape.layer_shapes[0][0].layer_parameters == count_parameters(layers[0][1])
    assert shape.layer_shapes[-1][0].layer_parameters == count_parameters(layers[-1][1])


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("mamba", {}, "no closed form for mamba"),
        ("bert", {}, "as a language model"),
        ("modernbert", {}, "as a language model"),
        ("deepseek_v2", {}, "without num_experts_per_tok"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu"),
        ("gpt2", {"add_cross_attention": True}, "with add_cross_attention"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual False"),
        ("opt", {"word_embed_proj_dim": 512}, "word_embed_proj_dim 512"),
        ("opt", {"layerdrop": 0.1}, "layerdrop 0.1"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None"),
    ],
)
def test_what_is_not_known_is_said(architecture: str, config: dict[str, Any], words: str) -> None:
    """No guess is made for what the closed form does not know."""
    found = read_shape(architecture, config)
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize(
    ("architecture", "key", "entry"),
    [("gemma3_text", "layer_types", "full_attention"), ("smollm3", "no_rope_layers", 1)],
)
def test_a_list_of_another_length_than_the_layers_is_refused(
    architecture: str, key: str, entry: object
) -> None:
    with pytest.raises(PlanError, match=rf"model.config.{key}: 2 entries for 3 layers"):
        read_shape(architecture, {**SMALL, key: [entry] * 2})


@pytest.mark.parametrize("architecture", [*ENCODERS, *LANGUAGE_MODELS])
def test_a_whole_config_says_the_same_as_its_defaults(architecture: str) -> None:
    """A config.json of the hub states every field, also those that equal the defaults of its class."""
    import transformers

    stated = {"num_experts_per_tok": 6} if architecture == "deepseek_v2" else {}
    whole = transformers.AutoConfig.for_model(architecture, **stated).to_dict()
    read, known = (read_shape(architecture, config, classes=2) for config in (whole, stated))
    assert isinstance(read, ModelShape)
    assert isinstance(known, ModelShape)
    alike = dataclasses.replace(known, windowed=read.windowed, segments=read.segments)
    assert read == alike
    assert any(read.windowed) == any(known.windowed)
    assert read.parameters == known.parameters
