"""DeepSpeed's JSON."""

from typing import Any

from drumline.session.importing.draft import MEANINGLESS, UNSUPPORTED, Draft

_NUMBERS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
)


def is_of(keys: dict[str, Any]) -> bool:
    """Whether a file's keys are DeepSpeed's."""
    return "zero_optimization" in keys or "train_micro_batch_size_per_gpu" in keys


def take(draft: Draft, given: dict[str, Any]) -> None:
    """Carry over a configuration; `auto` leaves what the other files say."""
    given = dict(given)
    zero = dict(given.pop("zero_optimization", None) or {})
    set_stage(draft, int(zero.pop("stage", 0) or 0))
    if (zero.pop("offload_optimizer", None) or {}).get("device", "none") not in ("none", None):
        draft.set("strategy.offload", "optimizer")
        draft.taken += 1
    offloaded = zero.pop("offload_param", None) or {}
    if offloaded.get("device", "none") not in ("none", None):
        draft.leave(
            "zero_optimization.offload_param", offloaded, UNSUPPORTED, "weights stay on the device"
        )
    for key, value in zero.items():
        draft.leave(
            f"zero_optimization.{key}",
            value,
            MEANINGLESS,
            "the engine chooses its buckets and overlap",
        )
    for name, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        stated = given.pop(name, None)
        if isinstance(stated, dict) and stated.get("enabled") is True:
            draft.set("precision", precision)
            draft.taken += 1
    optimizer = given.pop("optimizer", None) or {}
    if optimizer:
        kind, parameters = str(optimizer.get("type", "AdamW")), dict(optimizer.get("params") or {})
        is_plain = parameters.pop("adam_w_mode", True) is False or parameters.pop(
            "torch_adam", False
        )
        draft.take("optim", "adamw" if kind.lower() == "adam" and not is_plain else kind)
        _take_parameters(draft, parameters)
    scheduler = given.pop("scheduler", None) or {}
    if scheduler:
        _take_schedule(draft, str(scheduler.get("type")), dict(scheduler.get("params") or {}))
    for name in _NUMBERS:
        value = given.pop(name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            draft.take(name, value)
    for key, value in given.items():
        if value not in ("auto", None, False):
            draft.leave(key, value, MEANINGLESS, "the engine is set up by the recipe")


def set_stage(draft: Draft, stage: int) -> None:
    """The strategy of a stage of ZeRO, under DeepSpeed."""
    draft.set("launch.launcher", "deepspeed")
    draft.set("strategy.name", f"zero{stage}" if stage else "ddp")
    draft.taken += 1


def take_name(draft: Draft, name: object) -> None:
    """The stage that the name of a configuration file says, where the file itself is not at hand."""
    text = str(name).replace("_", "").replace("-", "").lower()
    stage = next((n for n in (0, 1, 2, 3) if f"zero{n}" in text or f"z{n}" in text), None)
    if "strategy.name" in draft.keys or name in (None, False, ""):
        return
    if stage is None:
        draft.differ(f"{name}: not at hand; import it together with this file")
        return
    set_stage(draft, stage)
    draft.comments["strategy.name"] = f"by the name of {name}, which was not at hand"


def _take_parameters(draft: Draft, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value == "auto":
            continue
        if name == "betas":
            draft.set("optimizer.betas", [float(one) for one in value])
            draft.taken += 1
        elif not draft.take({"eps": "adam_epsilon"}.get(name, name), value):
            draft.leave(
                f"optimizer.params.{name}", value, MEANINGLESS, "the optimizer has no such option"
            )


def _take_schedule(draft: Draft, name: str, given: dict[str, Any]) -> None:
    """DeepSpeed's schedules: a warm-up to the peak, then constant, down to 0 in a line, or a cosine."""
    draft.take("lr_scheduler", name)
    if isinstance(steps := given.get("warmup_num_steps"), int):
        draft.take("warmup_steps", steps)
    peak, start = given.get("warmup_max_lr"), given.get("warmup_min_lr")
    if isinstance(peak, float):
        draft.set("optimizer.lr", peak)
        if isinstance(start, float) and start:
            draft.set("schedule.warmup_start_ratio", round(start / peak, 12))
    if name == "WarmupCosineLR":
        draft.set("schedule.min_lr_ratio", float(given.get("cos_min_ratio", 0.0001)))
        draft.set("schedule.warmup_start_ratio", float(given.get("warmup_min_ratio", 0.0)))
    if given.get("warmup_type", "log") == "log":
        draft.differ("DeepSpeed's warm-up grows with the logarithm of the step; here it is a line")
    if isinstance(total := given.get("total_num_steps"), int):
        draft.set("duration.steps", total)
