"""Parameter counts without torch, held against the real models of transformers."""

from typing import Any

import pytest

from toolkit.plan.shapes import find_shape

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
]


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_counts_are_those_of_the_real_model(architecture: str, config: dict[str, Any]) -> None:
    """All parameters, and those of one layer, equal the model built on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        full = transformers.AutoConfig.for_model(architecture, **config)
        model = transformers.AutoModelForCausalLM.from_config(full)
    shape = find_shape(architecture, config)
    assert shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    assert shape.layers == len(layers)
    assert shape.layer_parameters == sum(p.numel() for p in layers[0].parameters())
    assert (shape.hidden, shape.vocabulary) == (full.hidden_size, full.vocab_size)


def test_other_architectures_are_unknown() -> None:
    """No guess is made for what the closed form does not know."""
    assert find_shape("mixtral", {}) is None
    assert find_shape("bert", {}) is None
