"""Whether training gives the same result under another split, and which parts of a model prevent it."""

from collections.abc import Mapping
from typing import Any, Literal

from drumline.architectures.shapes import ModelShape
from drumline.plan.batch import Split
from drumline.plan.model import SplitInvariance
from drumline.recipe.schema import Recipe

SMALL_BATCHNORM = 8
_OF_CLASSIFIERS = ("classifier", "cls_", "pooler", "summary_")
"""Dropouts with these prefixes belong to heads that a language model does not have."""


def split_invariance(
    recipe: Recipe,
    shape: ModelShape | None,
    config: Mapping[str, Any],
    batchnorm: Literal["yes", "no", "unknown"],
) -> SplitInvariance:
    """Level `rounding` if the result depends on the split only by rounding; else `none` with all reasons.

    Of an objective of the project it is `unknown`.

    `config`: of the model, with that of a pretrained one. `batchnorm`: whether a factory's model has it.
    """
    reasons = []
    if batchnorm == "unknown":
        reasons.append(
            f"unknown until built: {recipe.model.factory} uses another package, whose model may have "
            "BatchNorm or dropout"
        )
    if batchnorm == "yes":
        reasons.append(
            "BatchNorm normalises each micro-batch by its own statistics"
            + (
                " (synchronised over ranks, not over accumulation)"
                if recipe.model.sync_batchnorm
                else ""
            )
        )
    dropout, key = _stated_dropout(config, recipe.data.facts.has_labels)
    if shape and shape.dropout >= (dropout or 0.0):
        dropout, key = shape.dropout, "dropout"
    if dropout:
        reasons.append(f"{key} {dropout:g} draws its masks per micro-batch")
    if recipe.model.adapter and recipe.model.adapter.dropout:
        reasons.append(
            f"adapter.dropout {recipe.model.adapter.dropout:g} draws its masks per micro-batch"
        )
    if recipe.data.audio and config.get(
        "apply_spec_augment", recipe.model.architecture != "whisper"
    ):
        reasons.append("apply_spec_augment masks parts of each micro-batch at random")
    if recipe.precision == "fp16":
        reasons.append("fp16 loss scaling overflows at places that depend on the split")
    if shape is None and recipe.model.source != "factory" and not dropout:
        name = recipe.model.architecture or recipe.model.name or recipe.model.path
        reasons.append(
            f"{name} has no closed form: dropouts that its config does not state, and auxiliary losses, "
            "are unknown"
        )
    if reasons:
        return SplitInvariance("none", "; ".join(reasons))
    if recipe.objective.factory:
        return SplitInvariance(
            "unknown",
            f"whether {recipe.objective.factory} is a sum over samples is not known before `drumline verify`",
        )
    rounding = "rounding"
    if recipe.precision == "bf16-pure":
        rounding = "the rounding of bf16, in which gradients are summed, too,"
    return SplitInvariance(
        "rounding", f"every sample has the same weight in every split; only {rounding} differs"
    )


def batchnorm_warnings(recipe: Recipe, split: Split, factory_has_batchnorm: bool) -> list[str]:
    """Warn if BatchNorm normalises over fewer than SMALL_BATCHNORM samples (Wu and He 2018)."""
    seen = split.per_device * (split.gpus if recipe.model.sync_batchnorm else 1)
    if not factory_has_batchnorm or seen >= SMALL_BATCHNORM:
        return []
    return [
        f"BatchNorm sees {seen} samples at a time, fewer than {SMALL_BATCHNORM}: its statistics are "
        "noise. GroupNorm does not depend on the batch"
    ]


def _stated_dropout(config: Mapping[str, Any], is_classifier: bool) -> tuple[float | None, str]:
    """The largest probability of any dropout that the config states, and its key; None without one."""
    stated = [
        (float(value), key)
        for key, value in config.items()
        if "drop" in key
        and (is_classifier or not key.startswith(_OF_CLASSIFIERS))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ]
    return max(stated, default=(None, ""))
