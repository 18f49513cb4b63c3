"""What a rank would die of in its first step is found before a job waits in a queue."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from unequal import unequal_plan, write_pairs

from conftest import ROOT, tiny_recipe
from drumline.errors import PlanError
from drumline.recipe.load import validate
from drumline.session.planning import make_plan
from drumline.session.prepare import prepare_data
from drumline.train.dry_pass import dry_pass

FAULTS = """
import torch
from drumline.train.objectives.base import Objective, Sums, model_inputs

class Wrong(Objective):
    def __init__(self, how):
        self.how = how
    def sums(self, model, batch):
        logits = model_inputs(model, batch)
        if self.how == "index":
            return Sums(logits[:, 99].sum())
        return Sums(logits.sum() * float("nan"))

def wrong(how):
    return Wrong(how)

def narrow(features, hidden, classes):
    return torch.nn.Linear(features - 1, classes)
"""


def plan_of(folder: Path, **changes: Any) -> Any:
    (folder / "faults.py").write_text(FAULTS)
    shutil.copy(ROOT / "recipes/example_models.py", folder)
    recipe = validate(tiny_recipe(**changes), "r")
    prepare_data(recipe)
    return make_plan(recipe)


def test_a_sound_recipe_passes(tmp_path: Path) -> None:
    """A factory's model, and a language model on rows of unequal length."""
    assert dry_pass(plan_of(tmp_path))
    assert dry_pass(unequal_plan(write_pairs(tmp_path), (2, 1, 6)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"factory": "faults:narrow"}}, "would fail: RuntimeError: .*shapes cannot be mult"),
        ({"objective": {"name": "custom", "factory": "faults:wrong", "options": {"how": "index"}}},
         "would fail: IndexError: index 99 is out of bounds"),
        ({"objective": {"name": "custom", "factory": "faults:wrong", "options": {"how": "nan"}}},
         "loss of the longest rows is nan"),
    ],
)  # fmt: skip
def test_what_would_fail_is_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """A model of another width than the features, an objective that fails, one that is not finite."""
    with pytest.raises(PlanError, match=words):
        dry_pass(plan_of(tmp_path, **changes, project=str(tmp_path)))


def test_a_large_model_is_left_out(tmp_path: Path) -> None:
    """Nothing is built that would take longer than the ranks' own pass."""
    large = {"source": "config", "architecture": "gpt2", "config": {
        "vocab_size": 50257, "n_positions": 64, "n_embd": 1024, "n_layer": 24, "n_head": 16}}  # fmt: skip
    assert not dry_pass(unequal_plan(write_pairs(tmp_path), (2, 1, 6), model=large))
