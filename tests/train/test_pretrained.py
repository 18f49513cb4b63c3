"""Pretrained weights read block by block are those that transformers' from_pretrained gives, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from drumline.architectures.hub import fetch, is_cached
from drumline.errors import PlanError
from drumline.recipe.schema import Model
from drumline.runs.inputs import model_fingerprint
from memory.plans import SMALL
from pretrained_folders import changed, saved
from train.test_models import TINY, loaded

FAMILIES = ["llama", "gpt2", "qwen3", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "gpt_neox", "olmo2",
            "phi3", "deepseek_v3"]  # fmt: skip


def assert_same(folder: Path, kind: str, model: torch.nn.Module) -> None:
    """Every parameter and buffer, and which of them are one."""
    other: Any = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    ours, theirs = (dict((*m.named_parameters(), *m.named_buffers())) for m in (model, other))
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert not any(t.is_meta for t in ours.values())


def with_random_buffers(folder: Path) -> Path:
    """The folder with other values in what is no parameter, as after a training."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        marks = ("running_", "correction_bias")
        return {
            n: torch.rand_like(w) if any(m in n for m in marks) else w for n, w in weights.items()
        }

    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("kind", "architecture", "config"), [
    ("AutoModelForCausalLM", "deepseek_v3", {}),
    ("AutoModelForImageClassification", "resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                                   "layer_type": "basic"}),
])  # fmt: skip
def test_trained_buffers_are_read_too(
    tmp_path: Path, kind: str, architecture: str, config: dict[str, Any]
) -> None:
    """Statistics of BatchNorm, and a router's corrections: not those of a new model."""
    full = config or config_of(architecture)
    folder = with_random_buffers(saved(tmp_path, kind, architecture, {**full, "num_labels": 3}))
    model = loaded(folder, None if kind == "AutoModelForCausalLM" else 3)
    assert_same(folder, kind, model)


def test_edits_run_on_loaded_weights(tmp_path: Path) -> None:
    """What an edit adds or changes is as it leaves it; what it looks at are the files' weights."""
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", TINY)
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def adapt(model):\n"
        "    model.extra = torch.nn.Linear(4, 4)\n"
        "    torch.nn.init.zeros_(model.extra.weight)\n"
        "    with torch.no_grad():\n"
        "        model.lm_head.weight.mul_(2)\n"
    )
    plain: Any = loaded(folder)
    edited: Any = loaded(folder, edits=["own:adapt"], project=str(tmp_path))
    assert not edited.extra.weight.any()
    assert torch.equal(edited.lm_head.weight, 2 * plain.lm_head.weight)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(edited.state_dict()[name], plain.state_dict()[name])


def config_of(architecture: str) -> dict[str, Any]:
    """A small config; several layers, so that there are several blocks."""
    return {**SMALL.get(architecture, TINY), "vocab_size": 257}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_are_transformers_own(tmp_path: Path, architecture: str) -> None:
    """In several files, so that a block can be in two; experts, which are one tensor each in files."""
    folder = saved(
        tmp_path, "AutoModelForCausalLM", architecture, config_of(architecture), shard="40KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same(folder, "AutoModelForCausalLM", loaded(folder))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2", "modernbert", "t5"])
def test_a_classifier_s_weights_are_transformers_own(tmp_path: Path, architecture: str) -> None:
    """With the head that the folder has."""
    kind = "AutoModelForSequenceClassification"
    folder = saved(tmp_path, kind, architecture, {**config_of(architecture), "num_labels": 3, "pad_token_id": 0,
                                                  "eos_token_id": 1})  # fmt: skip
    assert_same(folder, kind, loaded(folder, 3))


def test_files_in_sixteen_bits_are_read_as_they_are(tmp_path: Path) -> None:
    """bf16 files: the same numbers in fp32."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", TINY)
    changed(folder, lambda weights: {n: w.to(torch.bfloat16) for n, w in weights.items()})
    assert_same(folder, "AutoModelForCausalLM", loaded(folder))


def test_training_does_not_write_into_the_files(tmp_path: Path) -> None:
    """Parameters are no views of the mapped files."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", TINY)
    before = (folder / "model.safetensors").read_bytes()
    model = loaded(folder)
    (folder / "model.safetensors").write_bytes(bytes(len(before)))
    assert any(bool(p.any()) for p in model.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_the_files_hold_twice(tmp_path: Path, equal: bool) -> None:
    """Of equal values they are one; of others they are two, as transformers has it."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", {**TINY, "tie_word_embeddings": True})

    def twice(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = weights["model.embed_tokens.weight"]
        return {**weights, "lm_head.weight": embedding.clone() if equal else embedding + 1}

    changed(folder, twice)
    model: Any = loaded(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert torch.equal(
        model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"]
    )


def test_only_the_head_of_a_tied_pair_in_the_files(tmp_path: Path) -> None:
    """The embedding is the head, whichever of both the files name."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", {**TINY, "tie_word_embeddings": True})
    changed(folder, lambda w: {n.replace("model.embed_tokens", "lm_head"): t for n, t in w.items()})
    model: Any = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(folder, "AutoModelForCausalLM", model)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as huggingface_hub lays it out, with one commit of one model; there is no network."""
    model = tmp_path / "hub/models--me--tiny"
    saved(model / f"snapshots/{COMMIT}", "AutoModelForCausalLM", "llama", TINY, shard="20KB")
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / f"snapshots/{COMMIT}"


def test_a_hub_model_comes_from_the_cache(hub_cache: Path) -> None:
    """By its branch or its commit; the commit is what a record keeps. An unknown branch is refused."""
    for revision in (None, "main", COMMIT):
        assert fetch("me/tiny", revision) == hub_cache
        spec = Model(source="hub", name="me/tiny", revision=revision)
        assert model_fingerprint(spec) == f"me/tiny@{COMMIT}"
    with pytest.raises(
        PlanError, match=r"me/tiny@v2 is not in the cache whole.*hf download me/tiny"
    ):
        fetch("me/tiny", "v2")
    with pytest.raises(ValidationError, match="source is not hub"):
        Model(source="folder", path="/x", revision="main")


def test_a_cache_that_lacks_a_shard_is_not_used(hub_cache: Path) -> None:
    """An interrupted download: it would be fetched again, which this machine cannot."""
    sorted(hub_cache.glob("model-*.safetensors"))[1].unlink()
    assert not is_cached("me/tiny", None)
    with pytest.raises(PlanError, match="not in the cache whole"):
        fetch("me/tiny", None)
