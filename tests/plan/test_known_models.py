"""Models on the hub that are known by name: their shapes, and plans without a network or a cache."""

from pathlib import Path

import pytest

from conftest import tiny_recipe
from drumline.architectures.configs import read_shape
from drumline.architectures.known_models import known_config, known_models
from drumline.architectures.shapes import ModelShape
from drumline.recipe.load import validate
from drumline.session.planning import make_plan


@pytest.mark.parametrize("name", known_models())
def test_the_shape_has_the_published_number_of_parameters(name: str) -> None:
    """To the last one, so that no width can be wrong; and each other name belongs to one row."""
    row = known_models()[name]
    shape = read_shape(row["type"], row["config"], row.get("classes"))
    assert isinstance(shape, ModelShape)
    assert shape.parameters == row["parameters"]
    for other in row.get("also", []):
        assert known_config(other) == known_config(name)
        assert sum(other in r.get("also", []) for r in known_models().values()) == 1
        assert other not in known_models()


def test_a_hub_model_is_planned_where_its_config_is_not_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published config, with a warning that says so; another name stays unknown, and is never guessed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "meta-llama/Llama-3.1-8B"
    sections = {
        "cluster": {"gpu": "h100-80gb", "gpus_per_node": 8},
        "strategy": {"name": "fsdp"},
        "precision": "bf16",
        "data": {"source": "files", "name": None, "options": {}, "path": "/x/*.jsonl", "task": "causal_lm",
                 "sequence_length": 4096},
        "batch": {"effective": 64, "per_device": 1, "gpus": 8},
    }  # fmt: skip
    model = {"source": "hub", "architecture": None, "factory": None, "config": {}}
    plan = make_plan(validate(tiny_recipe(model={**model, "name": name}, **sections), "r"))
    assert plan.cost.parameters == 8030261248
    assert plan.memory.method == "closed-form"
    assert any(f"the config of {name} is not in the local cache" in w for w in plan.warnings)
    copied = {**model, "name": "NousResearch/Llama-3.1-8B"}
    assert make_plan(validate(tiny_recipe(model=copied, **sections), "r")).memory == plan.memory
    other = {**model, "name": "somebody/Llama-3.1-8B-finetune"}
    unknown = make_plan(validate(tiny_recipe(model=other, **sections), "r"))
    assert unknown.memory.method == "unknown"
