"""What a model or a training is refused for with a "Nearest" is built when that is followed."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from unequal import unequal_plan, write_pairs
from whole_tensors import whole_tensors

from advice import LM, ROOT, Row, heard, here, programs, refused, worked
from conftest import tiny_recipe
from drumline.data.dataset_manifest import DatasetManifest
from drumline.data.factory import load_factory
from drumline.errors import LaunchError, PlanError
from drumline.recipe import yaml12
from drumline.recipe.load import load_recipe, validate
from drumline.session.planning import make_plan
from drumline.train import worker
from drumline.train.dry_pass import dry_pass
from drumline.train.models import ModelBuilder
from drumline.train.objectives import build_objective
from pretrained_folders import changed, saved, without
from train.test_models import TINY

__all__ = ["here", "programs"]

MANIFEST = DatasetManifest(task="causal_lm", fingerprint="f", samples=9, validation_samples=0, sequence_length=16,
                           tokenizer="bytes", token_dtype="<u2", vocabulary=257)  # fmt: skip
GPT2 = {"vocab_size": 257, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
CONFIG = {"source": "config", "architecture": "gpt2", "config": GPT2}
MLP = {
    "source": "factory",
    "factory": "example_models:mlp",
    "config": {"features": 4, "hidden": 4, "classes": 2},
}
CODE = """from drumline.train.objectives import Objective


def freeze_all(model):
    model.requires_grad_(False)


def freeze_embeddings(model):
    model.transformer.wte.requires_grad_(False)


def nothing():
    return object()


class Mine(Objective):
    def sums(self, model, batch):
        return None
"""

MODELS: list[Row] = [
    Row("100 < 257 tokens of the tokenizer. Nearest: vocab_size 320", {**CONFIG, "config": {**GPT2, "vocab_size": 100}},
        [{"config": {**GPT2, "vocab_size": 320}}]),
    Row("can call torch.utils.checkpoint itself. Nearest: none", {**MLP, "activation_checkpointing": "full"},
        [{"activation_checkpointing": "none"}]),
    Row("no parameter is trainable. Nearest: fewer frozen ones", {**CONFIG, "edits": ["mine:freeze_all"]},
        [{"edits": ["mine:freeze_embeddings"]}, {"edits": []}]),
]  # fmt: skip


def build(folder: Path, model: dict[str, Any], manifest: DatasetManifest = MANIFEST) -> Any:
    """The model of a recipe with this section, whole; its project's code is `CODE`."""
    (folder / "mine.py").write_text(CODE)
    is_mlp = model.get("factory") == MLP["factory"]
    plain = tiny_recipe(project=str(ROOT / "recipes" if is_mlp else folder))
    data = {
        "source": "files",
        "path": "/x.txt",
        "task": "causal_lm",
        "tokenizer": "bytes",
        "sequence_length": 16,
    }
    recipe = validate({**plain, "model": model, "data": data}, "r")  # fmt: skip
    return ModelBuilder(recipe, manifest).whole()


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.words)
def test_a_model_is_built_as_the_message_says(tmp_path: Path, row: Row) -> None:
    """Its config, policy or edits are refused; with what the message names it has all its weights."""
    with pytest.raises(PlanError) as caught:
        build(tmp_path, row.wrong)
    heard(row.words, str(caught.value))
    for way in row.ways:
        model = build(tmp_path, {**row.wrong, **way})
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_folder_s_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    """A pretrained model of 100 tokens under a tokenizer of 257 loads with one of 100."""
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", {**TINY, "vocab_size": 100})
    model = {"source": "folder", "path": str(folder)}
    with pytest.raises(PlanError) as caught:
        build(tmp_path, model)
    heard("Nearest: data.tokenizer, the one that the model was trained with", str(caught.value))
    build(tmp_path, model, dataclasses.replace(MANIFEST, vocabulary=100))


def test_weights_without_a_rule_for_their_first_values(tmp_path: Path) -> None:
    """What transformers' from_config makes, saved, is loaded from its folder."""
    config = {"vocab_size": 257, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    with pytest.raises(PlanError) as caught:
        build(tmp_path, {"source": "config", "architecture": "openai-gpt", "config": config})
    heard("Nearest: model.source=folder, of what from_config makes", str(caught.value))
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "openai-gpt", config)
    build(tmp_path, {"source": "folder", "path": str(folder)})


def test_files_that_lack_weights_are_saved_whole(tmp_path: Path) -> None:
    """What save_pretrained writes is loaded."""
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", TINY)
    whole = shutil.copytree(folder, tmp_path / "whole")
    changed(folder, without("mlp"))
    with pytest.raises(PlanError) as caught:
        build(tmp_path, {"source": "folder", "path": str(folder)})
    heard("Nearest: the folder that the model was saved to with save_pretrained", str(caught.value))
    build(tmp_path, {"source": "folder", "path": str(whole)})


def test_an_objective_without_sums_is_made_a_subclass(tmp_path: Path) -> None:
    """A subclass of the class that the message names is built."""
    (tmp_path / "mine.py").write_text(CODE)

    def objective(factory: str) -> Any:
        named = {"name": "custom", "factory": factory}
        return build_objective(validate(tiny_recipe(project=str(tmp_path), objective=named), "r"))

    with pytest.raises(PlanError) as caught:
        objective("mine:nothing")
    heard("Nearest: a subclass of drumline.train.objectives.Objective", str(caught.value))
    assert callable(objective("mine:Mine").sums)


def test_weights_that_make_no_finite_loss_are_looked_at(tmp_path: Path) -> None:
    """The model's weights are not finite: with others the longest rows pass."""
    pairs = write_pairs(tmp_path)
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", TINY)
    whole = shutil.copytree(folder, tmp_path / "whole")
    changed(folder, lambda weights: {n: w * float("nan") for n, w in weights.items()})
    with pytest.raises(PlanError) as caught:
        dry_pass(unequal_plan(pairs, (2, 1, 6), model={"source": "folder", "path": str(folder)}))
    heard("of the prepared data, and at the model's weights", str(caught.value))
    assert dry_pass(unequal_plan(pairs, (2, 1, 6), model={"source": "folder", "path": str(whole)}))


@pytest.mark.parametrize("strategy", ["{name: zero2}", "{name: zero3, offload: optimizer}"])
def test_what_deepspeed_cannot_trace_is_told_otherwise(here: Path, strategy: str) -> None:
    """Without --trace, or with the overrides that are named, the plan is printed."""
    words = ("plan", "project/lm.yaml", "launch.launcher=deepspeed", f"strategy={strategy}")
    told = heard("DeepSpeed cannot be traced without a GPU", refused(*words, "--trace"))
    worked(*words)
    worked(*words, "--trace", *told.strip().rpartition(", or ")[2].split())


def test_what_syncs_batchnorm_is_traced_without(here: Path) -> None:
    """sync_batchnorm false: the plan for the GPU is traced."""
    Path("r.yaml").write_text(yaml12.dump(tiny_recipe()))
    worked("prepare", "r.yaml")
    words = ("plan", "r.yaml", "cluster.gpu=h100-80gb", "--trace")
    told = refused(*words, "model.sync_batchnorm=true")
    heard("needs a GPU. Nearest: sync_batchnorm false", told)
    worked(*words, "model.sync_batchnorm=false")


def test_an_export_of_a_factory_s_model_is_loaded_by_hand(here: Path) -> None:
    """The page that is named says how the parts in the checkpoint that is named make the model's weights."""
    worked("prepare", "finished-mlp", "--trust-code")
    told = refused("export", "finished-mlp", "out", "--trust-code")
    heard("a factory's model is not one of transformers'", told)
    found = re.search(r"load (.+) yourself; (\S+) says", told)
    assert found
    for word in ("rank-<r>.safetensors", "`model.<weight>`", "`boxes`"):
        assert word in (ROOT / found[2]).read_text()
    model = load_factory("small_model:mlp", str(here / "project"))()
    weights = whole_tensors(Path(found[1]), "model.")
    model.load_state_dict({n.removeprefix("model."): value for n, value in weights.items()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine must lack the GPU")
def test_a_gpu_that_is_not_here_is_the_cpu(here: Path, forked: Any) -> None:
    """cluster.gpu=cpu trains what was planned for a GPU."""
    words = ("run", str(here / LM), "duration.steps=2", "schedule.warmup_steps=0")
    done = forked(*words, "cluster.gpu=h100-80gb", "precision=bf16", "--run-dir", "a")
    assert done.returncode == 2, done.stderr
    heard("which shows 0 GPUs. Nearest: cluster.gpu=cpu", done.stderr)
    assert not Path("a").exists()
    recipe = str(here / LM)
    with pytest.raises(LaunchError) as caught:  # where the driver says nothing, the rank does
        worker._device(make_plan(load_recipe(recipe, ["cluster.gpu=h100-80gb"])))
    heard("this machine shows 0. Nearest: cluster.gpu=cpu", str(caught.value))
    assert worker._device(make_plan(load_recipe(recipe, ["cluster.gpu=cpu"]))).type == "cpu"
    done = forked(*words, "cluster.gpu=cpu", "precision=bf16", "--run-dir", "b")
    assert done.returncode == 0, done.stderr


def test_a_run_that_diverges_is_given_a_smaller_rate(here: Path, forked: Any) -> None:
    """A rate at which the loss is not finite ends the run; with a smaller one it is trained."""
    words = (
        "run",
        str(here / LM),
        "duration.steps=6",
        "schedule.warmup_steps=0",
        "anomalies.max_skipped=2",
    )
    done = forked(*words, "optimizer.lr=1e30", "--run-dir", "a")
    assert done.returncode == 4, done.stderr
    heard("Nearest: a smaller optimizer.lr", done.stderr)
    done = forked(*words, "optimizer.lr=1e-3", "--run-dir", "b")
    assert done.returncode == 0, done.stderr
