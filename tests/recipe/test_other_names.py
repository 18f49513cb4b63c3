"""Names of other tools: a message says what a recipe calls them, with the value converted, and the fix works."""

import shlex
from typing import Any

import pytest

from conftest import tiny_recipe
from drumline.errors import RecipeError
from drumline.recipe import other_names
from drumline.recipe.load import merge, parse_override, validate
from drumline.recipe.other_names import OPTIMIZERS, RENAMED, SCHEDULES, STRATEGIES, keys_for
from drumline.recipe.schema import Recipe

VALUES: dict[str, Any] = {
    "per_device_train_batch_size": 6, "micro_batch_size": 6, "gradient_accumulation_steps": 2, "learning_rate": "2e-5", "eval_steps": 5, "save_steps": 7, "logging_steps": 2, "save_total_limit": 3,
    "num_train_epochs": 3, "bf16": True, "fp16": True, "gradient_checkpointing": True, "optim": "adamw_torch_fused",
    "lr_scheduler_type": "cosine_with_min_lr", "adam_epsilon": "1e-7",
    "attn_implementation": "eager", "dataloader_num_workers": 2, "label_smoothing_factor": 0.1, "report_to": "tensorboard",
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_the_message_names_our_key_and_the_fix_works(name: str) -> None:
    raw = tiny_recipe()
    with pytest.raises(RecipeError) as error:
        validate({**raw, name: VALUES[name]}, "r")
    told = str(error.value)
    assert f"{name}: unknown key. Nearest: " in told
    fixes = shlex.split(told.partition("Nearest: ")[2])
    base = {**raw, "duration": {}} if "duration" in told else raw
    for fix in fixes:
        base = merge(base, parse_override(fix))
    assert validate(base, "r") != validate(raw, "r")


@pytest.mark.parametrize(
    ("section", "names"),
    [("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("strategy", STRATEGIES)],
)
def test_values_of_other_tools(section: str, names: dict[str, Any]) -> None:
    """Each is one that we take, or a message says which that is."""
    for name, keys in names.items():
        raw = tiny_recipe(
            **{section: {"name": name, **({"lr": 0.1} if section == "optimizer" else {})}}
        )
        if keys[f"{section}.name"] == name:
            assert validate(raw, "r")
            continue
        with pytest.raises(RecipeError) as error:
            validate(raw, "r")
        assert f"Nearest: {section}.name={keys[f'{section}.name']}" in str(error.value)


def keys_of(section: Any, prefix: str = "") -> set[str]:
    """All dotted keys of the schema, lists by number."""
    found = set()
    for name, field in section.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        found |= {path, f"{path}.0", f"{path}.1"}
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                found |= keys_of(kind, f"{path}.")
    return found


def test_every_name_leads_to_a_key() -> None:
    """Also those that are no key by themselves, such as one of two betas."""
    known = keys_of(Recipe)
    assert set(RENAMED.values()) <= known
    samples = {
        "sharding_strategy": "hybrid_shard",
        "lora_target": "all", "lora_target_modules": "all", "lora_alpha": 16, "quantization_bit": 4, "optim": "adamw",
        "adam_beta1": 0.9, "adam_beta2": 0.9, "flash_attn": "fa2", "attn_implementation": "sdpa", "warmup_steps": 5,
        "lr_scheduler": "cosine", "lr_scheduler_type": "cosine", "report_to": "wandb",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "num_cycles": 2, "power": 2.0},
    }  # fmt: skip
    for name in other_names._CONVERTED:
        found = keys_for(name, samples.get(name, True))
        assert found
        assert set(found) <= known, name


def test_true_and_false_of_checkpointing() -> None:
    for value, policy in ((True, "full"), (False, "none")):
        raw = tiny_recipe(model={"activation_checkpointing": value})
        assert validate(raw, "r").model.activation_checkpointing == policy


def test_values_of_other_tools_under_our_own_names() -> None:
    """`packing: true` and `strategy: fsdp` are what people write first; the message has what is meant."""
    for change, fix in (
        ({"data": {"packing": True}}, "Nearest: data.packing=documents"),
        ({"strategy": "fsdp"}, "Nearest: strategy.name=fsdp"),
        ({"strategy": "FULL_SHARD"}, "Nearest: strategy.name=fsdp"),
        ({"strategy": {"name": "ZeRO-3"}}, "strategy.name=zero3 launch.launcher=deepspeed"),
        ({"strategy": "sharded"}, "choices of strategy.name: ddp, fsdp, zero1, zero2, zero3"),
        ({"optimizer": "adamw_torch"}, "Nearest: optimizer.name=adamw"),
        ({"precision": "bf16-mixed"}, "did you mean"),
    ):
        with pytest.raises(RecipeError) as error:
            validate(
                {
                    **tiny_recipe(),
                    **{
                        k: {**tiny_recipe().get(k, {}), **v} if isinstance(v, dict) else v
                        for k, v in change.items()
                    },
                },
                "r",
            )
        assert fix.lower() in str(error.value).lower(), str(error.value)
