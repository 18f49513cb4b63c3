"""torchtune's YAML."""

import re
from typing import Any

from drumline.architectures.known_models import known_models
from drumline.session.importing import arguments
from drumline.session.importing.draft import MEANINGLESS, UNSUPPORTED, Draft

_HUB = {
    "alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup", "samsum_dataset": "Samsung/samsum",
    "grammar_dataset": "liweili/c4_200m", "stack_exchange_paired_dataset":
    "lvwerra/stack-exchange-paired", "wikitext_dataset": "Salesforce/wikitext",
    "cnn_dailymail_articles_dataset": "ccdv/cnn_dailymail",
}  # fmt: skip
_OPTIMIZERS = {
    "AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "PagedAdamW8bit": "adamw_8bit", "AdamW8bit":
    "adamw_8bit", "PagedAdamW": "adamw", "PagedAdam8bit": "adamw_8bit",
}  # fmt: skip


def is_of(keys: dict[str, Any]) -> bool:
    """Whether a file's keys are torchtune's."""
    return any(isinstance(value, dict) and "_component_" in value for value in keys.values())


def take(draft: Draft, given: dict[str, Any]) -> None:
    """Carry over a configuration."""
    given = dict(given)
    for key in ("metric_logger", "profiler"):
        given.pop(key, None)
    _take_model(draft, given)
    _take_rows(draft, given)
    _take_optimizer(draft, given)
    loss = str((given.pop("loss", None) or {}).get("_component_", ""))
    if "Chunked" in loss or "LinearCrossEntropy" in loss:
        draft.set("loss.chunked", True)
    if "DPO" in loss or "DPO" in str(given.get("rlhf_loss")):
        arguments.take_preference(draft, {"loss_type": "dpo"}, "dpo")
    if (dtype := given.pop("dtype", None)) in ("bf16", "fp32"):
        is_narrow = dtype == "bf16"
        comment = "torchtune's bf16 is of the weights, too" if is_narrow else ""
        draft.set("precision", "bf16-pure" if is_narrow else dtype, comment)
        draft.taken += 1
    if given.get("batch_size"):
        given["per_device_train_batch_size"] = given.pop("batch_size")
    given.pop("enable_activation_offloading", None)
    if given.get("clip_grad_norm") is None:
        given.pop("clip_grad_norm", None)
        draft.set("optimizer.max_grad_norm", None)
    if given.get("seed") is None:
        draft.set("seed", 0, "torchtune draws one where none is stated")
    draft.take_all({k: v for k, v in given.items() if k not in ("output_dir",)}, "torchtune")
    draft.set("strategy.name", "fsdp", "torchtune's distributed recipes", weakly=True)
    draft.set("schedule.name", "constant", weakly=True)
    draft.set("batch.accumulation", 1, weakly=True)
    draft.set("duration.epochs", 1.0, weakly=True)


def _take_model(draft: Draft, given: dict[str, Any]) -> None:
    model, checkpointer = (
        dict(given.pop("model", None) or {}),
        given.pop("checkpointer", None) or {},
    )
    folder = str(checkpointer.get("checkpoint_dir") or "")
    base = folder.rstrip("/").rpartition("/")[2]
    rows = known_models()
    names = [name for row, held in rows.items() for name in (row, *held.get("also", []))]
    named = next(
        (
            n
            for n in names
            if base
            and n.rpartition("/")[2].lower() in (base.lower(), base.lower().removeprefix("meta-"))
        ),
        None,
    )
    if named:
        draft.set("model.source", "hub")
        draft.set("model.name", named, f"by the name of {folder}")
        draft.set("data.tokenizer", named)
    elif folder:
        arguments.set_model(draft, folder.rstrip("/"))
    given.pop("tokenizer", None) if not isinstance(given.get("tokenizer"), dict) else None
    tokenizer = given.pop("tokenizer", None) or {}
    most = tokenizer.get("max_seq_len")
    comment = "" if most else "chosen: torchtune states none, and pads to the longest row"
    draft.set("data.sequence_length", int(most or 4096), comment)
    component = str(model.pop("_component_", ""))
    draft.taken += 2
    if "lora" in component or "dora" in component:
        draft.set("model.adapter.rank", int(model.pop("lora_rank", 8)))
        targets = list(model.pop("lora_attn_modules", None) or ["q_proj", "v_proj"])
        targets = [{"output_proj": "o_proj"}.get(one, one) for one in targets]
        if model.pop("apply_lora_to_mlp", False):
            targets += ["gate_proj", "up_proj", "down_proj"]
        draft.set("model.adapter.targets", targets)
        if model.pop("apply_lora_to_output", False):
            draft.leave(
                "model.apply_lora_to_output", True, UNSUPPORTED, "Instead: model.adapter.train_also"
            )
        draft.set("model.adapter.alpha", float(model.pop("lora_alpha", 16)))
        draft.set("model.adapter.dropout", float(model.pop("lora_dropout", 0.0)))
        if model.pop("use_dora", False) or "dora" in component:
            draft.set("model.adapter.dora", True)
        draft.taken += 5
    if "qlora" in component or "qdora" in component or model.pop("quantize_base", False):
        draft.set("model.quantization", "nf4")
    for key, value in model.items():
        if value is not None:
            draft.leave(f"model.{key}", value, UNSUPPORTED, "config.json says what the model is")


def _take_rows(draft: Draft, given: dict[str, Any]) -> None:
    data = given.pop("dataset", None) or {}
    one = dict(data[0] if isinstance(data, list) else data)
    if isinstance(data, list) and len(data) > 1:
        draft.leave(
            "dataset",
            f"{len(data)} sets",
            UNSUPPORTED,
            "the first was taken. Instead: data.mixture",
        )
    component = str(one.pop("_component_", "")).rpartition(".")[2]
    source, files = one.pop("source", None), one.pop("data_files", None)
    if files:
        draft.set("data.source", "files")
        draft.set("data.path", str(files))
    elif source or component in _HUB:
        draft.set("data.source", "hub")
        draft.set("data.name", str(source or _HUB[component]))
    draft.set(
        "data.task",
        "causal_lm" if "text_completion" in component or "wikitext" in component else "sft",
        weakly=True,
    )
    if one.pop("packed", False):
        draft.set("data.packing", "documents")
    if one.pop("train_on_input", False):
        draft.set("data.train_on", "all")
    if column := one.pop("conversation_column", None):
        draft.set("data.messages_field", str(column))
    if column := one.pop("column", None):
        draft.set("data.text_field", str(column))
    if draft.keys.get("data.task") == "sft" and component:
        draft.differ(
            f"{component}: torchtune frames rows by a prompt template of the set or the model; here they are "
            "turns of the tokenizer's chat template, or of data.chat_template"
        )
    if split := one.pop("split", None):
        if re.fullmatch(r"\w+", str(split)):
            draft.set("data.split", str(split))
        else:
            draft.leave(
                "dataset.split", split, UNSUPPORTED, "a part of a split. Instead: data.samples"
            )
    draft.taken += 2
    for key, value in one.items():
        if value is not None:
            draft.leave(f"dataset.{key}", value, UNSUPPORTED, "rows are recognised by the first")
    if "stack_exchange" in component or "preference" in component or "hh_rlhf" in component:
        draft.set("data.task", "preference")


def _take_optimizer(draft: Draft, given: dict[str, Any]) -> None:
    optimizer = dict(given.pop("optimizer", None) or {})
    name = str(optimizer.pop("_component_", "torch.optim.AdamW")).rpartition(".")[2]
    if name in _OPTIMIZERS:
        draft.set("optimizer.name", _OPTIMIZERS[name])
    else:
        draft.leave("optimizer._component_", name, UNSUPPORTED, "Instead: optimizer.name=adamw")
    if optimizer.pop("fused", None):
        draft.set("optimizer.implementation", "fused")
    if "weight_decay" not in optimizer and name in ("AdamW", "PagedAdamW8bit", "AdamW8bit"):
        draft.set("optimizer.weight_decay", 0.01, "the default of torch's AdamW")
    draft.taken += 1
    for key, value in optimizer.items():
        if key == "betas":
            draft.set("optimizer.betas", [float(one) for one in value])
        elif not draft.take(key, value):
            draft.leave(f"optimizer.{key}", value, MEANINGLESS, "the optimizer has no such option")
    scheduler = dict(given.pop("lr_scheduler", None) or {})
    if scheduler:
        draft.take("lr_scheduler", str(scheduler.get("_component_", "")))
        if scheduler.get("num_warmup_steps"):
            draft.take("warmup_steps", int(scheduler["num_warmup_steps"]))
