"""What each key means: for editors, for `drumline explain`, and in the reference, all from keys.yaml."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from advice import command, heard
from conftest import ROOT, tiny_recipe
from drumline.errors import RecipeError
from drumline.recipe import catalogue, yaml12
from drumline.recipe.keys import _texts, find_key, json_schema, keys, keys_in
from drumline.recipe.load import merge
from drumline.recipe.schema import Recipe
from plan.test_fields import _fields

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def problems(recipe: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in VALIDATOR.iter_errors(recipe)
    ]


def test_every_key_has_a_meaning_and_every_text_a_key() -> None:
    """None is left out, and none is explained that is not there."""
    found = keys()
    assert set(_fields(Recipe)) <= {name.removesuffix(".0") for name in found}
    assert all(key.meaning.endswith((".", ")")) for key in found.values())
    written = {
        f"{section}.{key}".lstrip(".") for section, texts in _texts().items() for key in texts
    }
    assert written == {
        name for name in found if not name.startswith(("data.evaluation.", "data.mixture."))
    } | {"data.mixture.weight", "data.mixture.label"}


def properties() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (kind, name, one)
        for kind, node in SCHEMA["$defs"].items()
        for name, one in node.get("properties", {}).items()
    ]


@pytest.mark.parametrize(
    ("kind", "name", "node"), properties(), ids=lambda one: one if isinstance(one, str) else ""
)
def test_editors_get_a_description_and_legal_examples(
    kind: str, name: str, node: dict[str, Any]
) -> None:
    """Each example is a value that the schema takes for this key."""
    assert node["description"]
    for example in node.get("examples", []):
        whole = {"$defs": SCHEMA["$defs"], **node}
        assert not list(Draft202012Validator(whole).iter_errors(example)), (kind, name, example)


@pytest.mark.parametrize("name", catalogue.names())
def test_shipped_recipes_are_valid_and_name_the_schema(name: str) -> None:
    text = (ROOT / f"recipes/{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert problems(yaml12.parse(text)) == []


WRONG: dict[str, dict[str, Any]] = {
    "an unknown section": {"optimiser": {"lr": 1e-3}},
    "an unknown key": {"batch": {"per_devise": 3}},
    "a number as text": {"optimizer": {"lr": "1e-3"}},
    "a rate of nothing": {"optimizer": {"lr": 0}},
    "a negative decay": {"optimizer": {"weight_decay": -0.1}},
    "an unknown optimizer": {"optimizer": {"name": "adamw_torch"}},
    "three betas": {"optimizer": {"betas": [0.9, 0.99, 0.999]}},
    "a beta of one": {"optimizer": {"betas": [0.9, 1.0]}},
    "half a GPU": {"batch": {"gpus": 1.5}},
    "no GPU": {"batch": {"gpus": 0}},
    "a remainder that is none": {"batch": {"remainder": "wrap"}},
    "true as a number": {"batch": {"accumulation": True}},
    "an unknown task": {"data": {"task": "classify"}},
    "an unknown source": {"data": {"source": "disk"}},
    "a share above one": {"data": {"validation": 1.5}},
    "an unknown strategy": {"strategy": {"name": "zero4"}},
    "an unknown precision": {"precision": "bfloat16"},
    "a schedule that is none": {"schedule": {"name": "cosine_with_restarts"}},
    "a negative warm-up": {"schedule": {"warmup_steps": -1}},
    "steps as a list": {"duration": {"steps": [20]}},
    "an adapter of no rank": {"model": {"adapter": {"rank": 0}}},
    "an unknown launcher": {"launch": {"launcher": "mpirun"}},
    "a card without memory": {"cluster": {"gpu": {"name": "x"}}},
    "another version": {"schema": 2},
    "a name with blanks": {"recipe": "My Recipe"},
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_recipes_are_refused(change: dict[str, Any]) -> None:
    """By the schema alone, which an editor has; the same recipe without the change is taken."""
    plain = tiny_recipe()
    assert problems(plain) == []
    assert problems(merge(copy.deepcopy(plain), change))


def test_what_is_missing_is_told_but_for_a_recipe_that_extends_another() -> None:
    plain = tiny_recipe()
    del plain["optimizer"]
    assert problems(plain) == [": 'optimizer' is a required property"]
    assert problems({"extends": "base.yaml", "recipe": "mine", "optimizer": {"name": "sgd"}}) == []
    assert problems({"extends": "base.yaml", "recipe": "mine", "optimizer": {"name": "sdg"}})


def test_a_key_is_found_by_its_last_part_and_by_the_names_of_other_tools() -> None:
    assert find_key("warmup_steps").name == "schedule.warmup_steps"
    assert find_key("per_device_train_batch_size").name == "batch.per_device"
    for name, ours in (("load_in_4bit", "model.quantization"), ("lora_target_modules", "model.adapter.targets"), ("fsdp", "strategy.name"),
                       ("ZeRO-3", "strategy.name"), ("LoRA", "model.adapter"), ("report_to", "logging.wandb.project"), ("gradient_checkpointing", "model.activation_checkpointing")):  # fmt: skip
        assert find_key(name).name == ours
    with pytest.raises(RecipeError) as unknown:
        find_key("find_unused_parameters")
    heard("no key of a recipe. Nearest: a section", str(unknown.value))
    assert [key.name for key in keys_in("strategy")] == [
        "strategy.name",
        "strategy.shard",
        "strategy.offload",
        "strategy.reshard",
        "strategy.reduce",
    ]
    for name, nearest in (
        ("every_steps", "evaluation.every_steps"),
        ("warmup_stepz", "warmup_steps"),
    ):
        with pytest.raises(RecipeError) as error:
            find_key(name)
        assert nearest in str(error.value).partition("Nearest: ")[2]
        heard("Nearest: ", str(error.value))


def test_explain_tells_the_arithmetic_of_a_recipe() -> None:
    """The equation for a key of the batch; rates for one of the schedule; all keys of a section."""
    done = command(
        "explain",
        "batch.per_device",
        "llama-8b-8xh100",
        "batch.per_device=4",
        "batch.accumulation=null",
    )
    assert done.code == 0
    assert done.out.startswith("batch.per_device\nSamples of one forward pass on one GPU.")
    assert "in llama-8b-8xh100: 4\n" in done.out
    assert "256 = 4 per_device × 8 gpus × 8 accumulation" in done.out
    assert "peak 0.0003 at step 1,000" in command("explain", "lr", "llama-8b-8xh100").out
    shown = command("explain", "checkpoint").out
    assert all(key.name in shown for key in keys_in("checkpoint"))
    wrong = command("explain", "no_such_key_at_all")
    assert wrong.code == 2
    heard("no key of a recipe. Nearest: ", wrong.err)
    assert command("explain", "batch.per_device").code == 0


def test_the_reference_is_not_stale() -> None:
    """docs/recipe.md, docs/commands.md and the schema of editors are made of what the product says."""
    path = ROOT / "docs/make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for page, text in made.pages().items():
        assert page.read_text() == text, f"{page.name}: run python docs/make_reference.py"


def test_a_copied_recipe_has_its_schema_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("recipes", "copy", "tiny-code-lm", "mine.yaml").code == 0
    assert json.loads(Path("recipe.schema.json").read_text()) == SCHEMA
    assert command("schema", "--to", "other.json").code == 0
    assert Path("other.json").read_text() == Path("recipe.schema.json").read_text()
