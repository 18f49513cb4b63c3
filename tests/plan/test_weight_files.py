"""A pretrained folder is checked by plan from the headers of its files: in milliseconds, without torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import tiny_recipe
from drumline.architectures.configs import read_shape
from drumline.architectures.shapes import ModelShape
from drumline.architectures.weight_files import weights_in
from drumline.architectures.weight_names import problem_with
from drumline.errors import PlanError
from drumline.plan.model import Plan
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.show import plan_table
from memory.plans import ENCODERS, IMAGES, SMALL
from pretrained_folders import changed, prefixed, saved, without


def planned(folder: Path, task: str = "causal_lm", **config: Any) -> Plan:
    recipe = tiny_recipe(
        model={"source": "folder", "path": str(folder), "architecture": None, "factory": None,
               "config": config},
        data={"source": "files", "name": None, "path": "/x.txt", "task": task, "sequence_length": 16,
              "tokenizer": "bytes", "samples": 99, "validation": 0.0},
    )  # fmt: skip
    return make_plan(validate(recipe, "r"))


@pytest.mark.parametrize("architecture", SMALL)
def test_what_transformers_saves_is_what_the_config_says(tmp_path: Path, architecture: str) -> None:
    """Every family, as a language model and as a classifier where it can be one: nothing is refused."""
    config = transformers.AutoConfig.for_model(architecture, **SMALL[architecture])
    kinds = [
        "AutoModelForImageClassification"
        if architecture in IMAGES
        else "AutoModelForSequenceClassification"
    ]
    kinds += ["AutoModel"] if architecture in ENCODERS else ["AutoModelForCausalLM"]
    for kind in kinds:
        is_classifier = kind != "AutoModelForCausalLM"
        try:
            saved(tmp_path / kind, kind, architecture, SMALL[architecture])
        except ValueError:  # transformers has no such classifier
            continue
        weights = weights_in(tmp_path / kind)
        shape = read_shape(architecture, config.to_dict(), 2 if is_classifier else None)
        assert weights
        assert isinstance(shape, ModelShape)
        assert problem_with(shape, weights, is_classifier) == ""


def cut(part: str) -> Any:
    """All but the first row of what has this in its name."""
    return lambda weights: {n: v[1:].clone() if part in n else v for n, v in weights.items()}


WRONG = [
    (prefixed("_orig_mod."), "every key begins with '_orig_mod.', as under torch.compile"),
    (prefixed("base_model.model."), "every key begins with 'base_model.model.', as under peft"),
    (without("layers.1.mlp.up"), "they lack model.layers.1.mlp.up_proj.weight"),
    (without("layers.1."), "they hold 3 layers and the config says 4"),
    (
        cut("layers.2.mlp.up"),
        "another shape than in other layers: model.layers.2.mlp.up_proj.weight",
    ),
    (without("mlp.up"), r"a layer holds [\d,]+ elements and the config's has"),
    (
        lambda w: {**w, "model.layers.3.extra": torch.zeros(3)},
        "the model has no model.layers.3.extra",
    ),
    (
        without("lm_head"),
        "which the config does not tie, they hold model.embed_tokens.weight alone",
    ),
    (without("embed_tokens"), "they hold lm_head.weight alone"),
    (cut("embed_tokens"), r"they hold [\d,]+ elements"),
    (lambda w: cut("embed_tokens")(cut("lm_head")(w)), "no embedding of 2048 × 256"),
    (lambda w: {**w, "more": torch.zeros(3)}, r"they hold [\d,]+ elements .* the model [\d,]+"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_files_of_another_model_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    """Missing, left over, of another shape, under another name: the keys are named, nothing is started."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", SMALL["llama"])
    assert planned(folder).cost.parameters
    with pytest.raises(PlanError, match=words):
        planned(changed(folder, change))


def test_a_config_that_the_recipe_changes_is_held_against_the_files(tmp_path: Path) -> None:
    """Fewer layers than the files hold would drop weights."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", SMALL["llama"])
    with pytest.raises(PlanError, match="they hold 4 layers and the config says 2"):
        planned(folder, num_hidden_layers=2)


def test_another_head_may_be_in_the_files(tmp_path: Path) -> None:
    """A language model's folder becomes a classifier; its base is compared all the same."""
    folder = saved(tmp_path, "AutoModelForCausalLM", "llama", {**SMALL["llama"], "pad_token_id": 0})
    plan = planned(folder, task="classification")
    assert plan.cost.weights_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert plan.cost.load_seconds
    assert "of weights, each block read by one rank: about 1 s" in plan_table(plan)
    with pytest.raises(PlanError, match="they lack model.layers.1.mlp"):
        planned(changed(folder, without("layers.1.mlp.up")), task="classification")


def test_a_damaged_folder_names_the_file(tmp_path: Path) -> None:
    """A lost shard, one that was cut off, one that is something else, a key that its index promises, a pickle."""
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", SMALL["llama"], shard="2MB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    planned(folder)
    whole = shards[1].read_bytes()
    for content, words in (
        (whole[:-100], f"{shards[1].name} has .* its header says .*: it was cut off"),
        (whole + b"x", "its header says"),
        (b"not weights", "not a safetensors file"),
        (b"", "not a safetensors file"),
        (None, f"{shards[1].name} is missing, which model.safetensors.index.json names for"),
    ):
        shards[1].unlink()
        if content is not None:
            shards[1].write_bytes(content)
        with pytest.raises(PlanError, match=words):
            planned(folder)
        shards[1].write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    plain["weight_map"]["model.norm.bias"] = shards[0].name
    index.write_text(json.dumps(plain))
    with pytest.raises(PlanError, match=f"{shards[0].name} has no model.norm.bias"):
        planned(folder)
    index.write_text("{")
    with pytest.raises(PlanError, match="not an index of weights"):
        planned(folder)
    for file in (*shards, index):
        file.unlink()
    assert any("holds no weights" in warning for warning in planned(folder).warnings)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PlanError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        planned(folder)
