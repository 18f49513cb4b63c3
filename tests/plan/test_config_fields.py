"""The table of transformers' config fields is that of the installed transformers, and is used by `plan`."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, tiny_recipe
from drumline.architectures.config_fields import check_config, config_fields
from drumline.errors import PlanError
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate

TABLE = ROOT / "toolkit/drumline/architectures/config_fields.txt"
LETTERS = {"int": "i", "float": "f", "bool": "b", "str": "s", "list": "l", "tuple": "l", "dict": "d",
           "PreTrainedConfig": "d", "RopeParameters": "d", "dtype": "s", "Literal": "s", "None": "n"}  # fmt: skip


def letters(kind: object) -> str:
    """A field's annotation in the table's letters; empty (anything) where it says more than these types."""
    text = str(kind).replace("<class '", "").replace("'>", "")
    text = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", text))
    names = [name.strip().rpartition(".")[2] for name in text.split("|")]
    if not all(name in LETTERS for name in names):
        return ""
    found = {LETTERS[name] for name in names}
    return "".join(letter for letter in "ifbsldn" if letter in found)


def lines() -> list[str]:
    """The table as the installed transformers has it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, dict[str, str]] = {}
    for name in CONFIG_MAPPING:
        kind: Any = CONFIG_MAPPING[name]
        own = {field.name: letters(field.type) for field in dataclasses.fields(kind)}
        mapped = {
            alias: own[name] for alias, name in (kind.attribute_map or {}).items() if name in own
        }
        found[name] = {**dict.fromkeys(_read_by_the_model(kind), ""), **mapped, **own}
    common = dict(set.intersection(*(set(fields.items()) for fields in found.values())))
    return [
        _line("*", common),
        *(
            _line(name, {key: value for key, value in fields.items() if common.get(key) != value})
            for name, fields in sorted(found.items())
        ),
    ]


def _read_by_the_model(kind: Any) -> list[str]:
    """Keys that the architecture's code reads though its config class has no field of that name: `head_dim`."""
    module = importlib.import_module(kind.__module__)
    assert module.__file__
    text = "".join(path.read_text() for path in Path(module.__file__).parent.glob("modeling_*.py"))
    named = re.findall(r"\bconfig\.([a-z]\w*)\b(?!\()", text)
    return named + re.findall(r"getattr\((?:self\.)?config, \"([a-z]\w*)\"", text)


def _line(name: str, fields: dict[str, str]) -> str:
    return " ".join([name, *(f"{key}:{value}" for key, value in sorted(fields.items()))])


def test_the_table_is_that_of_the_installed_transformers(pytestconfig: pytest.Config) -> None:
    """Every architecture and field; `--rewrite-goldens` makes it anew."""
    text = "\n".join(lines()) + "\n"
    if pytestconfig.getoption("--rewrite-goldens"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text
    assert config_fields("llama")["num_key_value_heads"] == "in"  # type: ignore[index]
    assert config_fields("gpt2")["hidden_size"] == "i"  # type: ignore[index]


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        (
            "llama",
            {"tie_word_embeddings": "no"},
            "'no' is text, llama takes true or false. Nearest: false",
        ),
        (
            "llama",
            {"hidden_size": 64.0},
            "64.0 is a number with a point, llama takes a whole number. Nearest: 64",
        ),
        (
            "llama",
            {"rms_norm_eps": 1},
            "1 is a whole number, llama takes a number with a point. Nearest: 1.0",
        ),
        ("gpt2", {"bias": False}, "model.config.bias: gpt2 has no such key"),
        ("gpt2", {"hello": 1}, "model.config.hello: gpt2 has no such key"),
        ("gpt2", {"n_layers": 2}, "Did you mean 'n_layer'?"),
        ("bert", {"hidden_dropout_prob": [0.1]}, "is a list"),
        ("t5", {"d_model": True}, "True is true or false, t5 takes a whole number"),
        ("mixtral", {"num_local_experts": None}, "None is null"),
    ],
)
def test_a_value_of_another_type_is_refused_in_plan(
    architecture: str, config: dict[str, Any], words: str
) -> None:
    """Of any architecture, known to the closed form or not; the message gives the value as it should be."""
    recipe = tiny_recipe(
        model={"source": "config", "architecture": architecture, "factory": None, "config": config},
        data={"task": "causal_lm", "sequence_length": 8},
    )
    del recipe["model"]["factory"]
    recipe["model"]["config"] = config
    with pytest.raises(PlanError) as error:
        resolve(validate(recipe, "recipe"))
    assert words in str(error.value)


def test_what_is_legal_passes() -> None:
    """Aliases, null where the class allows it, sub-configs, and architectures that the table lacks."""
    check_config("gpt2", {"hidden_size": 32, "n_inner": None, "num_labels": 3})
    check_config("llama", {"rope_parameters": {"rope_theta": 5e5}, "attention_dropout": 0})
    check_config("qwen2", {"head_dim": 16})
    check_config("my-own", {"anything": object})
