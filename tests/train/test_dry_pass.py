"""What a rank would die of in its first step is found before a job waits in a queue."""

from pathlib import Path

import pytest
from unequal import unequal_plan, write_pairs

from conftest import tiny_recipe
from drumline.errors import PlanError
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.train.dry_pass import dry_pass
from pretrained_folders import changed, saved
from train.test_models import TINY


def test_a_sound_recipe_passes(tmp_path: Path) -> None:
    """A model of the project, and a language model on rows of unequal length."""
    recipe = validate(tiny_recipe(), "r")
    prepare_data(recipe)
    assert dry_pass(make_plan(recipe))
    assert dry_pass(unequal_plan(write_pairs(tmp_path), (2, 1, 6)))


def test_what_would_fail_is_told(tmp_path: Path) -> None:
    """A config that no check knows to be impossible, and weights that are not finite."""
    pairs = write_pairs(tmp_path)
    config = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = {"source": "config", "architecture": "gptj", "config": {**config, "rotary_dim": 48}}
    with pytest.raises(PlanError, match="the first step would fail: RuntimeError"):
        dry_pass(unequal_plan(pairs, (2, 1, 6), model=model))
    folder = saved(tmp_path / "m", "AutoModelForCausalLM", "llama", TINY)
    changed(folder, lambda weights: {n: w * float("nan") for n, w in weights.items()})
    with pytest.raises(PlanError, match="the loss of the longest rows is nan"):
        dry_pass(unequal_plan(pairs, (2, 1, 6), model={"source": "folder", "path": str(folder)}))


def test_a_large_model_is_left_out(tmp_path: Path) -> None:
    """Nothing is built that would take longer than the ranks' own pass."""
    large = {"source": "config", "architecture": "gpt2", "config": {
        "vocab_size": 50257, "n_positions": 64, "n_embd": 1024, "n_layer": 24, "n_head": 16}}  # fmt: skip
    assert not dry_pass(unequal_plan(write_pairs(tmp_path), (2, 1, 6), model=large))
