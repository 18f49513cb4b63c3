"""Parameter counts without torch, held against the real models of transformers."""

from typing import Any

import pytest

from drumline.architectures.configs import read_shape
from drumline.architectures.shapes import ModelShape

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
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
    ("qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}),
    ("mixtral", {**SMALL, "num_local_experts": 4}),
    ("qwen3_moe", {**SMALL, "num_experts": 8, "moe_intermediate_size": 40, "vocab_size": 99}),
]


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
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    assert shape.layers == len(layers)
    assert shape.layer_parameters == sum(p.numel() for p in layers[0].parameters())
    assert (shape.hidden, shape.vocabulary) == (full.hidden_size, full.vocab_size)


@pytest.mark.parametrize(
    ("architecture", "config", "kind"),
    [
        ("bert", {}, "SequenceClassification"),
        ("bert", {**SMALL, "vocab_size": 99}, "SequenceClassification"),
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


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("mamba", {}, "no closed form for mamba"),
        ("bert", {}, "as a language model"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu"),
        ("gpt2", {"add_cross_attention": True}, "with add_cross_attention"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "no experts"),
    ],
)
def test_what_is_not_known_is_said(architecture: str, config: dict[str, Any], words: str) -> None:
    """No guess is made for what the closed form does not know."""
    found = read_shape(architecture, config)
    assert isinstance(found, str)
    assert words in found
