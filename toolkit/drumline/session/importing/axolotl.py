"""axolotl's YAML."""

from typing import Any

from drumline.session.importing import arguments, deepspeed
from drumline.session.importing.draft import UNSUPPORTED, Draft
from drumline.session.importing.fsdp import take_sharding

_ALPACA = ("alpaca", "alpaca_chat", "alpaca_w_system", "oasst", "instruct")
_OF_A_SET = (
    "split", "name", "field", "field_messages", "conversation", "message_field_role", "message_field_content",
    "message_property_mappings", "chat_template", "roles", "roles_to_train", "train_on_eos",
    "trust_remote_code", "revision", "shards", "field_human", "field_model", "field_instruction",
    "field_output",
)  # fmt: skip
_OF_THE_LOSS = (
    "dpo_label_smoothing",
    "simpo_gamma",
    "kto_desirable_weight",
    "kto_undesirable_weight",
)
_CHATS = ("chat_template", "sharegpt", "chat", "conversation", "openai_chat")


def is_of(keys: dict[str, Any]) -> bool:
    """Whether a file's keys are axolotl's."""
    return "base_model" in keys and bool(
        {"datasets", "pretraining_dataset", "micro_batch_size", "sequence_len"} & set(keys)
    )


def take(draft: Draft, given: dict[str, Any]) -> None:
    """Carry over a configuration."""
    given = dict(given)
    arguments.set_model(draft, str(given.pop("base_model")))
    if revision := given.pop("revision_of_model", None) or given.pop("base_model_revision", None):
        draft.set("model.revision", str(revision))
    if tokenizer := given.pop("tokenizer_config", None):
        draft.set("data.tokenizer", str(tokenizer))
    given.pop("base_model_config", None)
    _take_precision(draft, given)
    _take_adapter(draft, given)
    _take_strategy(draft, given)
    _take_attention(draft, given)
    _take_rows(draft, given)
    _take_objective(draft, given)
    _take_cadences(draft, given)
    if given.get("batch_size") and not given.get("gradient_accumulation_steps"):
        micro = int(given.get("micro_batch_size") or 1)
        given["gradient_accumulation_steps"] = max(1, int(given["batch_size"]) // micro)
    given.pop("batch_size", None)
    if given.get("cosine_min_lr_ratio") is not None:
        draft.set("schedule.min_lr_ratio", float(given.pop("cosine_min_lr_ratio")))
        draft.taken += 1
    if given.get("max_steps"):
        given.pop("num_epochs", None)
    if "optimizer" in given:
        given["optim"] = given.pop("optimizer")
    arguments.drop_warmup(draft, given)
    draft.take_all(given, "axolotl")
    for key, value in (
        ("optimizer.name", "adamw"),
        ("schedule.name", "cosine"),
        ("batch.accumulation", 1),
        ("optimizer.max_grad_norm", 1.0),
    ):
        draft.set(key, value, "the default of axolotl", weakly=True)
    if "duration.steps" not in draft.keys:
        draft.set("duration.epochs", 1.0, "the default of axolotl", weakly=True)


def _take_precision(draft: Draft, given: dict[str, Any]) -> None:
    stated = {
        key: given.pop(key, None) for key in ("bf16", "bfloat16", "fp16", "float16", "float32")
    }
    if stated["bf16"] or stated["bfloat16"]:
        draft.set("precision", "bf16")
        draft.taken += 1
        draft.differ(
            "axolotl keeps the weights themselves in bf16, whose small updates are lost; precision bf16 "
            "keeps fp32 ones beside them (`precision: bf16-pure` does as axolotl does)"
        )
    elif stated["fp16"] or stated["float16"]:
        draft.set("precision", "fp16")
        draft.taken += 1
    given.pop("tf32", None)


def _take_adapter(draft: Draft, given: dict[str, Any]) -> None:
    adapter = given.pop("adapter", None)
    if adapter not in (None, "", "lora", "qlora"):
        draft.leave("adapter", adapter, UNSUPPORTED, "Instead: adapter lora")
    if adapter not in ("lora", "qlora"):
        for key in [key for key in given if key.startswith(("lora_", "peft_"))] + [
            "load_in_8bit",
            "load_in_4bit",
        ]:
            given.pop(key, None)
        return
    draft.set("model.adapter.rank", int(given.pop("lora_r", None) or 8))
    draft.taken += 1
    if adapter == "qlora":
        given["load_in_4bit"] = True
    if given.pop("lora_target_linear", None):
        draft.set("model.adapter.targets", "all-linear")
        given.pop("lora_target_modules", None)
        draft.taken += 1
    saved = given.pop("lora_modules_to_save", None)
    if saved:
        draft.set("model.adapter.train_also", [f"*{name}*" for name in saved])
        draft.taken += 1


def _take_strategy(draft: Draft, given: dict[str, Any]) -> None:
    deepspeed.take_name(draft, given.pop("deepspeed", None))
    fsdp, config = given.pop("fsdp", None), given.pop("fsdp_config", None) or {}
    if fsdp or config:
        draft.set("strategy.name", "fsdp")
        take_sharding(draft, fsdp if isinstance(fsdp, list) else [fsdp], config)
        draft.taken += 1
        if config.get("fsdp_offload_params") or config.get("offload_params"):
            draft.leave(
                "fsdp_config.offload_params", True, UNSUPPORTED, "weights stay on the device"
            )
        if config.get("activation_checkpointing") or config.get("fsdp_activation_checkpointing"):
            draft.set("model.activation_checkpointing", "full")


def _take_attention(draft: Draft, given: dict[str, Any]) -> None:
    for key, name in (
        ("flash_attention", "flash"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if given.pop(key, None):
            draft.set("model.attention", name)
            draft.taken += 1


def _take_rows(draft: Draft, given: dict[str, Any]) -> None:
    given.setdefault("sequence_len", 512)
    listed = given.pop("pretraining_dataset", None)
    if listed:
        listed = [listed] if isinstance(listed, str | dict) else listed
        draft.set("data.task", "causal_lm")
    else:
        listed = given.pop("datasets", None) or []
    if given.pop("train_on_inputs", False):
        draft.set("data.train_on", "all")
        draft.taken += 1
    template = given.pop("chat_template", None)
    if template == "chatml":
        draft.set("data.chat_template", "chatml")
    elif template not in (None, "tokenizer_default") and not str(template).startswith(
        "tokenizer_default"
    ):
        draft.differ(
            f"chat_template {template}: the tokenizer's own is used; state a file if it is another"
        )
    if jinja := given.pop("chat_template_jinja", None):
        draft.leave(
            "chat_template_jinja", jinja, UNSUPPORTED, "Instead: data.chat_template, a file with it"
        )
    sources = [_source(draft, one) for one in listed]
    if sources:
        arguments.set_sources(draft, sources)
        draft.taken += 1
    tests = [_source(draft, one) for one in given.pop("test_datasets", None) or []]
    if tests:
        if tests[0]["source"] == "hub":
            tests[0].setdefault("split", "test")
        draft.set("data.evaluation", tests[0])
        draft.taken += 1
    share = given.pop("val_set_size", None)
    if isinstance(share, float) and 0 < share < 1 and not tests:
        draft.set("data.validation", share)
        draft.taken += 1
    elif share and not tests:
        draft.leave(
            "val_set_size",
            share,
            UNSUPPORTED,
            "a number of rows. Instead: data.validation, their share",
        )
    draft.set("data.task", "sft", weakly=True)
    given.pop("eval_sequence_len", None)


def _source(draft: Draft, one: Any) -> dict[str, Any]:
    """A set of axolotl's as a source of ours, and what its type says of the task."""
    one = {"path": one} if isinstance(one, str) else dict(one)
    path, kind, files = str(one.pop("path", "")), one.pop("type", None), one.pop("data_files", None)
    files = (
        files
        if isinstance(files, str)
        else (next(iter(files)) if files and len(files) == 1 else files)
    )
    if (
        one.pop("ds_type", None)
        and files is None
        and not path.endswith((".json", ".jsonl", ".parquet", ".csv"))
    ):
        files = path
    found: dict[str, Any] = {"source": "files", "path": files} if files else {}
    if not found and (
        path.startswith(("/", "./", "../", "~"))
        or path.endswith((".json", ".jsonl", ".parquet", ".csv", ".txt"))
    ):
        found = {"source": "files", "path": path}
    if not found:
        found = {"source": "hub", "name": path}
        if one.get("split"):
            found["split"] = one["split"]
        if one.get("name"):
            draft.set("data.config", str(one["name"]))
    name = kind if isinstance(kind, str) else "fields" if isinstance(kind, dict) else ""
    base = name.partition(":")[0].partition(".")[0]
    if base == "completion":
        draft.set("data.task", "causal_lm")
        if field := one.get("field"):
            draft.set("data.text_field", str(field))
    elif base in _CHATS:
        if field := one.get("field_messages"):
            draft.set("data.messages_field", str(field))
    elif base in _ALPACA:
        draft.differ(
            f"type {base}: axolotl frames an instruction by a prompt of its own; here it is a turn of the "
            "tokenizer's chat template, or of data.chat_template"
        )
    elif base and base not in ("fields", "chatml", "user_defined", "llama3", "bradley_terry"):
        draft.leave(
            "datasets.type",
            kind,
            UNSUPPORTED,
            "rows are recognised by the first; see docs/finetuning.md",
        )
    if isinstance(kind, dict):
        draft.leave(
            "datasets.type",
            kind,
            UNSUPPORTED,
            "prompts of your own: write prompt and completion, or chats",
        )
    for key in _OF_A_SET:
        one.pop(key, None)
    for key, value in one.items():
        draft.leave(f"datasets.{key}", value, UNSUPPORTED, "it is not used")
    return found


def _take_objective(draft: Draft, given: dict[str, Any]) -> None:
    kind = given.pop("rl", None)
    if kind is None:
        return
    if kind not in ("dpo", "ipo", "kto", "orpo", "simpo"):
        draft.leave(
            "rl",
            kind,
            UNSUPPORTED,
            "there is no reinforcement learning. Instead: data.task=preference",
        )
        return
    own = {"beta": given.pop("rl_beta", None) or given.pop("orpo_alpha", None)}
    own |= {key: given.pop(key, None) for key in _OF_THE_LOSS}
    loss = given.pop("dpo_loss_type", None)
    arguments.take_preference(draft, {**own, "loss_type": loss[0] if loss else kind}, kind)


def _take_cadences(draft: Draft, given: dict[str, Any]) -> None:
    for key, section in (("evals_per_epoch", "evaluation"), ("saves_per_epoch", "checkpoint")):
        times = given.pop(key, None)
        if times:
            draft.set(f"{section}.every_epochs", round(1 / int(times), 6))
            draft.taken += 1
    for key in ("eval_steps", "save_steps"):
        if isinstance(given.get(key), float) and given[key] < 1:
            draft.leave(
                key, given.pop(key), UNSUPPORTED, "a share of all steps. Instead: every_epochs"
            )
    arguments.take_cadences(draft, given)
