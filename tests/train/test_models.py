"""Building models: the same weights at any split, safetensors only, clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_recipe
from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import PlanError
from drumline.recipe.load import validate
from drumline.train.models import ModelBuilder, named_blocks

MANIFEST = DatasetManifest(
    task="causal_lm",
    fingerprint="f",
    samples=9,
    validation_samples=0,
    sequence_length=16,
    tokenizer="bytes",
    token_dtype="<u2",
    vocabulary=257,
)
CONFIG = {"vocab_size": 257, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
GPT2 = {"source": "config", "factory": None, "architecture": "gpt2", "config": CONFIG}


def built(manifest: DatasetManifest = MANIFEST, **model: Any) -> torch.nn.Module:
    recipe = validate(
        tiny_recipe(
            model={**GPT2, **model},
            data={"source": "files", "name": None, "path": "/x.txt", "task": "causal_lm",
                  "sequence_length": 16, "samples": None, "validation": 0.0},
        ), "r")  # fmt: skip
    return ModelBuilder(recipe, manifest).whole()


def test_weights_have_the_architecture_s_own_distribution() -> None:
    """transformers' rule holds block by block: 0.02, residual projections 0.02/sqrt(2·layers), zeros and ones."""
    state = built(config={**CONFIG, "n_embd": 256}).state_dict()
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["transformer.h.1.mlp.c_proj.weight"].std().item() == pytest.approx(
        0.02 / 6**0.5, rel=0.05
    )
    assert not state["transformer.h.0.attn.c_attn.bias"].any()
    assert torch.equal(state["transformer.ln_f.weight"], torch.ones(256))
    assert not any(t.is_meta for t in state.values())


def test_blocks_differ_and_depth_does_not_move_the_others() -> None:
    """Each block has its own draw, and adding a layer leaves the weights of the rest alone."""
    three, four = built().state_dict(), built(config={**CONFIG, "n_layer": 4}).state_dict()
    name = "transformer.h.{}.attn.c_attn.weight"
    assert not torch.equal(three[name.format(0)], three[name.format(1)])
    assert torch.equal(three[name.format(1)], four[name.format(1)])
    assert torch.equal(three["transformer.wte.weight"], four["transformer.wte.weight"])


def test_tied_weights_are_one_tensor() -> None:
    """The head is the embedding."""
    model: Any = built()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, _ in named_blocks(model)] == [f"transformer.h.{i}" for i in range(3)]


def test_a_folder_is_loaded_from_safetensors_only(tmp_path: Path) -> None:
    """The same weights come back; a pickle is refused even where it is all there is."""
    model: Any = built()
    model.save_pretrained(tmp_path / "good")
    folder = {
        "source": "folder",
        "architecture": None,
        "config": {},
        "path": str(tmp_path / "good"),
    }
    again = built(**folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    bad = tmp_path / "bad"
    bad.mkdir()
    model.config.save_pretrained(bad)
    torch.save(model.state_dict(), bad / "pytorch_model.bin")
    with pytest.raises(PlanError, match="model.path"):
        built(**{**folder, "path": str(bad)})


def test_wrong_models_are_named() -> None:
    """An unknown architecture, a vocabulary that is too small, checkpointing where there is none."""
    with pytest.raises(PlanError, match="model.architecture: gpt22"):
        built(architecture="gpt22")
    with pytest.raises(
        PlanError, match=r"hidden_dropout_prb: unknown key. Did you mean 'hidden_dropout_prob'"
    ):
        built(architecture="bert", config={"vocab_size": 300, "hidden_dropout_prb": 0.0})
    with pytest.raises(PlanError, match="vocab_size: 100 < 257 tokens.*Nearest: vocab_size 320"):
        built(config={**CONFIG, "vocab_size": 100})
    with pytest.raises(PlanError, match="comes from a factory"):
        built(source="factory", architecture=None, factory="example_models:mlp",
              config={"features": 4, "hidden": 4, "classes": 2}, activation_checkpointing="full")  # fmt: skip
    with pytest.raises(PlanError, match="does not suit example_models:mlp"):
        built(
            source="factory", architecture=None, factory="example_models:mlp", config={"width": 4}
        )
