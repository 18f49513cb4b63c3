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
        draft.take("optim", str(optimizer.get("type", "AdamW")))
        _take_parameters(draft, optimizer.get("params") or {})
    scheduler = given.pop("scheduler", None) or {}
    if scheduler:
        draft.take("lr_scheduler", str(scheduler.get("type")))
        steps = (scheduler.get("params") or {}).get("warmup_num_steps")
        if isinstance(steps, int):
            draft.take("warmup_steps", steps)
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
