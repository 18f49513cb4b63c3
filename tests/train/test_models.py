"""Building models: the same weights at any split, safetensors only, clear errors."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, tiny_recipe
from drumline.architectures.labels import number_of_labels
from drumline.data.dataset_manifest import DatasetManifest
from drumline.errors import PlanError
from drumline.recipe.load import validate
from drumline.train.models import ModelBuilder, named_blocks
from drumline.train.objectives.base import model_inputs
from memory.plans import IMAGES, SMALL
from pretrained_folders import changed, prefixed, saved, without

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


def built(
    manifest: DatasetManifest = MANIFEST, task: str = "causal_lm", **model: Any
) -> torch.nn.Module:
    recipe = validate(
        tiny_recipe(
            model={**GPT2, **model},
            data={"source": "files", "name": None, "path": "/x.txt", "task": task, "tokenizer": "bytes",
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


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 257}  # fmt: skip


def config_of(architecture: str) -> dict[str, Any]:
    if architecture in IMAGES:
        return SMALL[architecture]
    return {**TINY, "pad_token_id": 0}


def loaded(folder: Path, classes: int | None = None, seed: int = 7, **config: Any) -> Any:
    """The model that a recipe makes of a folder, as a classifier if there are classes."""
    return builder_of(folder, classes, seed, **config).whole()


def builder_of(
    folder: Path,
    classes: int | None,
    seed: int,
    edits: tuple[str, ...] | list[str] = (),
    project: str | None = None,
    **config: Any,
) -> ModelBuilder:
    task = {"task": "classification", "tokenizer": "bytes"} if classes else {"task": "causal_lm"}
    recipe = validate(
        tiny_recipe(
            model={"source": "folder", "path": str(folder), "architecture": None, "factory": None,
                   "config": config, "edits": list(edits)},
            data={"source": "files", "name": None, "path": "/x.txt", "sequence_length": 16, "samples": None,
                  "validation": 0.0, **task}, seed=seed, project=project or str(ROOT / "recipes"),
        ), "r")  # fmt: skip
    return ModelBuilder(recipe, dataclasses.replace(MANIFEST, classes=classes))


@pytest.mark.parametrize(
    ("kind", "architecture", "new"),
    [
        ("AutoModel", "bert", ["classifier.bias", "classifier.weight"]),
        ("AutoModelForMaskedLM", "bert", ["classifier.weight", "bert.pooler.dense.weight"]),
        ("AutoModelForCausalLM", "llama", ["score.weight"]),
        ("AutoModel", "siglip", ["classifier.bias", "classifier.weight"]),
        ("AutoModel", "dinov2", ["classifier.bias", "classifier.weight"]),
    ],
)
def test_a_new_head_is_drawn_from_the_seed(
    tmp_path: Path, kind: str, architecture: str, new: list[str]
) -> None:
    """The same at every load, another with another seed; what is new is said, the rest is as in the files."""
    folder = saved(tmp_path, kind, architecture, config_of(architecture))
    one, same, other = (loaded(folder, 3, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    (told,) = builder_of(folder, 3, 7).notes
    assert differing <= {name for name in one if name in told}
    for name in new:
        assert name in told
        assert name in differing or name.endswith("bias")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed("_orig_mod."), "lack lm_head.weight.*begins with '_orig_mod.', as under torch.compile"),
        (prefixed("module."), "Every key begins with 'module.', as under DDP"),
        (prefixed("base_model.model."), "Every key begins with 'base_model.model.', as under peft"),
        (without("lm_head"), "lack lm_head.weight. Nearest"),
        (without("layers.1.mlp"), "lack model.layers.1.mlp.down_proj.weight, .* Nearest"),
        (lambda w: {**w, "model.layers.7.extra": torch.zeros(3)}, "unlike the model, model.layers.7.extra"),
        (lambda w: {n: v[:8] if "lm_head" in n else v for n, v in w.items()}, "shape of lm_head.weight"),
    ],
)  # fmt: skip
def test_every_key_is_accounted_for(tmp_path: Path, change: Any, words: str) -> None:
    """Missing, left over or of another shape: never random weights instead of the pretrained ones."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", TINY)
    assert loaded(folder)
    with pytest.raises(PlanError, match=words):
        loaded(changed(folder, change))


@pytest.mark.parametrize(
    ("kind", "architecture", "change"),
    [
        ("AutoModelForMaskedLM", "bert", prefixed("module.")),
        ("AutoModelForMaskedLM", "bert", without("layer.1.output")),
        ("AutoModelForMaskedLM", "bert", without("bert.")),
        ("AutoModel", "bert", lambda w: {**w, "encoder.layer.2.more": torch.zeros(3)}),
        ("AutoModel", "siglip", without("vision_model.encoder.layers.1.mlp")),
        ("AutoModel", "siglip", lambda w: {**w, "vision_model.more": torch.zeros(3)}),
        ("AutoModel", "dinov2", without("layer.1.mlp")),
    ],
)
def test_a_classifier_too_needs_the_whole_base(
    tmp_path: Path, kind: str, architecture: str, change: Any
) -> None:
    """Only its head, and a pooler, may be new."""
    folder = saved(tmp_path, kind, architecture, config_of(architecture))
    with pytest.raises(PlanError, match="the files of"):
        loaded(changed(folder, change), classes=2)


def test_a_head_of_the_folder_is_kept_where_it_covers_the_data(tmp_path: Path) -> None:
    """Three labels and data with two: the same head. Four: refused, or a new one if the recipe says so."""
    folder = saved(
        tmp_path, "AutoModelForSequenceClassification", "bert", {**TINY, "num_labels": 3}
    )
    weights = load_file(folder / "model.safetensors")
    for classes in (2, 3):
        assert torch.equal(loaded(folder, classes).classifier.weight, weights["classifier.weight"])
    with pytest.raises(
        PlanError, match="head: 3 < 4 classes.*model.config.num_labels=4, which draws"
    ):
        loaded(folder, 4)
    assert loaded(folder, 4, num_labels=4).classifier.out_features == 4


@pytest.mark.parametrize(
    ("stated", "found", "classes", "words"),
    [
        (
            {"num_labels": 2},
            None,
            4,
            "num_labels: 2 < 4 classes of the data. Nearest: num_labels 4",
        ),
        ({}, {"id2label": {"0": "a", "1": "b"}}, 3, "head: 2 < 3 classes"),
        ({}, None, 1, "every row has class 0"),
    ],
)
def test_labels_that_do_not_cover_the_data_are_refused(
    stated: dict[str, Any], found: dict[str, Any] | None, classes: int, words: str
) -> None:
    """Also by plan, which calls the same function."""
    with pytest.raises(PlanError, match=words):
        number_of_labels(stated, found, classes)


def test_a_classifier_pools_the_last_token_of_each_row() -> None:
    """Rows that are padded in a micro-batch have the loss that they have alone: padding has the config's id."""
    config = {**TINY, "pad_token_id": 256}
    model: Any = built(
        dataclasses.replace(MANIFEST, classes=2),
        architecture="llama",
        config=config,
        task="classification",
    )
    lengths = (3, 7, 5)
    ids = torch.randint(1, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
    together = model_inputs(model, batch).logits
    for row, length in enumerate(lengths):
        alone = {
            "input_ids": ids[row : row + 1, :length],
            "attention_mask": mask[row : row + 1, :length].long(),
        }
        torch.testing.assert_close(together[row], model_inputs(model, alone).logits[0])


def test_a_classifier_of_padded_rows_needs_a_pad_token() -> None:
    """Transformers would fail at the first micro-batch of several rows."""
    with pytest.raises(
        PlanError, match="pad_token_id: llama has none.*Nearest: model.config.pad_token_id=0"
    ):
        built(
            dataclasses.replace(MANIFEST, classes=2),
            architecture="llama",
            config=TINY,
            task="classification",
        )
