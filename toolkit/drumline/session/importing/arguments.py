"""transformers' TrainingArguments, with those of TRL's trainers and of the scripts around them."""

from typing import Any

from drumline.session.importing import deepspeed
from drumline.session.importing.draft import MEANINGLESS, UNSUPPORTED, Draft
from drumline.session.importing.fsdp import take_sharding

_DEFAULTS = {
    "batch.per_device": 8,
    "optimizer.lr": 5e-5,
    "duration.epochs": 3.0,
    "schedule.name": "linear",
    "optimizer.max_grad_norm": 1.0,
}
"""What transformers takes where nothing is stated."""
_OF_THE_REFERENCE = (
    "ref_model", "precompute_ref_log_probs", "max_prompt_length", "force_use_ref_model", "reference_free",
    "ref_adapter_name", "model_adapter_name",
)  # fmt: skip
_PREFERENCE = (
    "beta", "loss_type", "ref_model", "precompute_ref_log_probs", "desirable_weight", "simpo_gamma",
    "cpo_alpha", "rpo_alpha", "max_prompt_length",
)  # fmt: skip
_LOSSES = {
    "sigmoid": "dpo",
    "ipo": "ipo",
    "simpo": "simpo",
    "orpo": "orpo",
    "kto": "kto",
    "dpo": "dpo",
}


def take(draft: Draft, given: dict[str, Any], trainer: str = "", tool: str = "arguments") -> None:
    """Carry over arguments; `trainer`: sft, dpo, kto or orpo where the command tells."""
    given = dict(given)
    take_model(draft, given)
    take_cadences(draft, given)
    _take_strategy(draft, given)
    if trainer in ("dpo", "kto", "orpo", "cpo") or any(key in given for key in _PREFERENCE):
        take_preference(draft, given, trainer)
    _take_data(draft, given, trainer)
    if int(given.get("max_steps") or 0) <= 0:
        given.pop("max_steps", None)
    else:
        given.pop("num_train_epochs", None)
    drop_warmup(draft, given)
    for name in ("eval_steps", "save_steps"):
        if isinstance(given.get(name), float) and given[name] < 1:
            draft.leave(
                name, given.pop(name), UNSUPPORTED, "a share of all steps. Instead: every_epochs"
            )
    draft.take_all(given, tool)
    for key, value in _DEFAULTS.items():
        if key == "duration.epochs" and "duration.steps" in draft.keys:
            continue
        draft.set(key, value, "the default of transformers", weakly=True)


def drop_warmup(draft: Draft, given: dict[str, Any]) -> None:
    """Transformers' constant schedule has no warm-up, whatever is stated; `constant_with_warmup` has one."""
    if "constant" not in (given.get("lr_scheduler_type"), given.get("lr_scheduler")):
        return
    for key in ("warmup_steps", "warmup_ratio"):
        if value := given.pop(key, None):
            draft.leave(key, value, MEANINGLESS, "transformers' constant schedule has no warm-up")


def take_model(draft: Draft, given: dict[str, Any]) -> None:
    """The model, its tokenizer and the dtype of its weights."""
    name = _first(given, "model_name_or_path", "model_name", "model_id", "model")
    if name:
        set_model(draft, str(name))
    if revision := _first(given, "model_revision"):
        draft.set("model.revision", str(revision))
    if tokenizer := _first(given, "tokenizer_name_or_path", "tokenizer_name", "tokenizer"):
        draft.set("data.tokenizer", str(tokenizer))
    dtype = str(_first(given, "torch_dtype", "dtype") or "")
    if dtype in ("bfloat16", "bf16") and given.get("bf16") is not False:
        draft.set("precision", "bf16")
        draft.differ(
            "torch_dtype bfloat16 trains weights in bf16, whose small updates are lost; precision bf16 keeps "
            "fp32 ones beside them (`precision: bf16-pure` does as it did)"
        )
    if given.pop("use_peft", None) or any(key.startswith("lora_") for key in given):
        draft.set("model.adapter.rank", given.get("lora_r", 16), weakly=True)


def set_model(draft: Draft, name: str) -> None:
    """A folder or a name of the hub."""
    is_path = name.startswith(("/", "./", "../", "~"))
    draft.set("model.source", "folder" if is_path else "hub")
    draft.set("model.path" if is_path else "model.name", name)
    draft.set("data.tokenizer", name, weakly=True)
    draft.taken += 1


def take_cadences(draft: Draft, given: dict[str, Any]) -> None:
    """When to evaluate and save: by steps, by epochs or never."""
    for keys, steps, section in (
        (("eval_strategy", "evaluation_strategy"), "eval_steps", "evaluation"),
        (("save_strategy",), "save_steps", "checkpoint"),
    ):
        strategy = _first(given, *keys)
        if strategy in ("epoch", "best"):
            draft.set(f"{section}.every_epochs", 1.0)
            given.pop(steps, None)
            draft.taken += 1
        elif strategy == "no":
            given.pop(steps, None)
            draft.taken += 1
        elif strategy == "steps" and steps not in given:
            draft.set(f"{section}.every_steps", 500, "the default of transformers")
            draft.taken += 1
        elif strategy is None and section == "evaluation":
            given.pop(steps, None) if "per_device_eval_batch_size" not in given else None
        elif strategy is not None:
            draft.taken += 1


def _take_strategy(draft: Draft, given: dict[str, Any]) -> None:
    """FSDP as the Trainer's own argument states it; DeepSpeed's file is read by itself."""
    deepspeed.take_name(draft, given.pop("deepspeed", None))
    fsdp = given.pop("fsdp", None)
    words = fsdp.split() if isinstance(fsdp, str) else list(fsdp or [])
    config = given.pop("fsdp_config", None)
    if words or fsdp is True:
        draft.set("strategy.name", "fsdp")
        take_sharding(draft, words, config if isinstance(config, dict) else {})
        draft.taken += 1
    if "offload" in words:
        draft.leave(
            "fsdp",
            "offload",
            UNSUPPORTED,
            "weights stay on the device. Instead: zero2 with offload",
        )
    if isinstance(config, dict):
        for key, value in config.items():
            draft.leave(
                f"fsdp_config.{key}", value, MEANINGLESS, "each layer of the model is wrapped"
            )


def take_preference(draft: Draft, given: dict[str, Any], trainer: str) -> None:
    """Preference pairs: which loss, and its strength."""
    loss = _first(given, "loss_type", "pref_loss")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    name = _LOSSES.get(str(loss)) or (trainer if trainer in ("kto", "orpo") else "dpo")
    draft.set("data.task", "preference")
    draft.set("objective.name", name)
    if loss and str(loss) not in _LOSSES:
        draft.set("objective.loss_type", str(loss))
    beta = _first(given, "beta", "pref_beta", "rl_beta", "dpo_beta")
    if beta is not None:
        draft.set("objective.beta", float(beta))
    for theirs, ours in (
        ("label_smoothing", "label_smoothing"),
        ("dpo_label_smoothing", "label_smoothing"),
        ("simpo_gamma", "gamma"),
        ("desirable_weight", "desirable_weight"),
        ("undesirable_weight", "undesirable_weight"),
        ("kto_desirable_weight", "desirable_weight"),
        ("kto_chosen_weight", "desirable_weight"),
        ("kto_undesirable_weight", "undesirable_weight"),
        ("kto_rejected_weight", "undesirable_weight"),
    ):
        value = given.pop(theirs, None)
        applies = ours in ("desirable_weight", "undesirable_weight")
        if not value:
            continue
        if applies == (name == "kto") and (ours != "gamma" or name == "simpo"):
            draft.set(f"objective.{ours}", float(value))
        else:
            draft.leave(theirs, value, UNSUPPORTED, f"it has no meaning for {name}")
    for key in _OF_THE_REFERENCE:
        if given.pop(key, None) is not None:
            draft.differ(
                "the reference's log-probabilities are computed once at the start, and kept"
            )
    draft.taken += 2


def _take_data(draft: Draft, given: dict[str, Any], trainer: str) -> None:
    """Where rows come from, and what of them is trained."""
    name = _first(given, "dataset_name", "dataset", "dataset_id", "dataset_id_or_path")
    path = _first(given, "train_file", "data_path", "train_data", "train_data_path", "data_file")
    mixed = given.pop("dataset_mixer", None)
    if isinstance(mixed, dict) and len(mixed) == 1:
        name, mixed = next(iter(mixed)), None
    if isinstance(mixed, dict):
        set_sources(draft, [{"source": "hub", "name": one} for one in mixed])
        draft.differ("dataset_mixer takes shares of each set; state weights in data.mixture")
    elif path:
        draft.set("data.source", "files")
        draft.set("data.path", str(path))
        draft.taken += 1
    elif name:
        set_source(draft, str(name))
    splits = given.pop("dataset_splits", None) or []
    split = (splits[0] if splits else None) or _first(
        given, "dataset_train_split", "train_split_name", "dataset_split"
    )
    if split and draft.keys.get("data.source") == "hub":
        draft.set("data.split", str(split))
    if config := _first(given, "dataset_config", "dataset_config_name"):
        draft.set("data.config", str(config))
    if validation := _first(given, "validation_file", "eval_file", "eval_data_path"):
        draft.set("data.evaluation", {"source": "files", "path": str(validation)})
    test = _first(given, "dataset_test_split") or (splits[1] if len(splits) > 1 else None)
    if test and draft.keys.get("data.source") == "hub" and _evaluates(given):
        evaluation = {"source": "hub", "name": draft.keys["data.name"], "split": str(test)}
        draft.set("data.evaluation", evaluation, weakly=True)
    if field := _first(given, "dataset_text_field", "text_column", "text_column_name"):
        draft.set("data.text_field", str(field))
    if template := _first(given, "chat_template_path"):
        draft.set("data.chat_template", str(template))
    if given.pop("completion_only_loss", None) is False:
        draft.set("data.train_on", "all")
    assistant_only = given.pop("assistant_only_loss", None)
    if "data.task" not in draft.keys:
        is_text = trainer != "sft" and "data.text_field" in draft.keys
        comment = "" if trainer else "chosen: the file does not say what the rows are"
        draft.set("data.task", "causal_lm" if is_text else "sft", comment)
    if trainer == "sft" and draft.keys["data.task"] == "sft" and not assistant_only:
        draft.set(
            "data.train_on",
            "all",
            "TRL counts all tokens of a chat unless assistant_only_loss is set",
        )


def _evaluates(given: dict[str, Any]) -> bool:
    return any(key in given for key in ("per_device_eval_batch_size", "eval_steps", "do_eval"))


def set_source(draft: Draft, name: str) -> None:
    """A file, a folder, or a set of the hub."""
    if name.startswith(("/", "./", "../", "~")) or name.endswith(
        (".json", ".jsonl", ".csv", ".parquet", ".txt")
    ):
        draft.set("data.source", "files")
        draft.set("data.path", name)
    else:
        draft.set("data.source", "hub")
        draft.set("data.name", name)
    draft.taken += 1


def set_sources(draft: Draft, sources: list[dict[str, Any]]) -> None:
    """One source, or a mixture of several with equal weights."""
    if len(sources) == 1:
        for key, value in sources[0].items():
            draft.set(f"data.{key}", value)
        return
    draft.set("data.mixture", [{"weight": 1.0, **one} for one in sources],
              "weights: chosen; the other tool takes each set as often as it has rows")  # fmt: skip


def _first(given: dict[str, Any], *names: str) -> Any:
    """The value of the first of these that is set; all of them are taken out."""
    values = [given.pop(name, None) for name in names]
    return next((value for value in values if value not in (None, "")), None)
